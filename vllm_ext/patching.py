"""Replacing a method of vLLM's by one of ours."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import vllm


def replace(owner: type, name: str, replacement: Callable[..., Any], parameters: tuple[str, ...]) -> inspect.Signature:
    """Put ``replacement(original, self, ...)`` in the place of a method that takes ``parameters``."""
    original = getattr(owner, name, None)
    signature = inspect.signature(original) if original else inspect.Signature()
    missing = [p for p in parameters if p not in signature.parameters]
    if original is None or missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__}: {owner.__name__}.{name} has changed (no {', '.join(missing) or 'such method'}); "
            "this configuration needs a repair of it on CPU. Use vLLM 0.32, or serve without that parallelism"
        )

    @wraps(original)
    def repaired(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, repaired)
    return signature
