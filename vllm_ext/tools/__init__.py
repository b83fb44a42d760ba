"""What verify, bench and doctor do inside vLLM's process."""
