"""Putting functions of ours in the place of SGLang's, or around them, by its own registry of hooks."""

from collections.abc import Callable
from typing import Any

import sglang


def hook(kind: str, hooks: dict[str, Callable[..., Any]]) -> None:
    """``REPLACE`` each target, or go ``AROUND`` it: called with the original first, then with its arguments."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, function in hooks.items():
        HookRegistry.register(target, function, HookType[kind])
    HookRegistry.apply_hooks()
    # It logs a target that it does not find, and goes on.
    missing = hooks.keys() - HookRegistry._patched
    if missing:
        raise RuntimeError(f"SGLang {sglang.__version__} has no {', '.join(sorted(missing))}, expected to hook it")
