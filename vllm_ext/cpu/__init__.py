"""The parts that vLLM lacks on CPUs."""
