"""Qwen3-Next for vLLM. The engine resolves ``vllm_ext:<class>``; nothing is imported before it does."""

from typing import Any

__all__ = ["Qwen3NextForCausalLM", "Qwen3NextMTP"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vllm_ext import model, mtp

        return getattr(mtp if name == "Qwen3NextMTP" else model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
