"""Qwen3-Next for SGLang. Nothing is imported until SGLang calls an entry point of ``register``."""
