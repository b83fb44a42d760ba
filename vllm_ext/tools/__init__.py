"""The code that verify, bench and doctor run inside vLLM's process."""
