"""What vLLM lacks on CPUs."""
