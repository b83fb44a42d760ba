"""The Qwen3-Next model for SGLang. Nothing is imported until SGLang calls an entry point of ``register``."""
