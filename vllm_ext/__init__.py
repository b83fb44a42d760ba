"""The Qwen3-Next model for vLLM. Modules are imported only when vLLM resolves ``vllm_ext:<class>``."""

from typing import Any

__all__ = ["Qwen3NextForCausalLM", "Qwen3NextMTP"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vllm_ext import model, mtp

        return getattr(mtp if name == "Qwen3NextMTP" else model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
