"""Qwen3-Next for vLLM and SGLang: the engine-independent core."""

__version__ = "0.1.0"
