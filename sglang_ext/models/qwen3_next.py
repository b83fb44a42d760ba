"""Registers the trunk and its draft under their architectures' names."""

from typing import Any

from sglang_ext.register import disabled


def entry_classes() -> list[type]:
    """Return our two classes, or none if the plugin is off but an inherited variable still names this package."""
    if disabled():
        return []
    try:
        from sglang_ext.model import Qwen3NextForCausalLM
        from sglang_ext.mtp import Qwen3NextForCausalLMMTP
    except Exception as e:
        return [refusing(name, e) for name in ("Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP")]
    return [Qwen3NextForCausalLM, Qwen3NextForCausalLMMTP]


def refusing(name: str, error: Exception) -> type:
    """Return a class that raises ``ImportError`` when a model of it is built.

    Servers of other models read this package too and must not fail. If the import raised an error, the registry would
    serve SGLang's own model.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError(
            f"qnext-plugin cannot import its model ({type(error).__name__}: {error}); install a supported SGLang, or "
            "set QNEXT_DISABLE=1 to serve SGLang's own model"
        ) from error

    return type(name, (), {"__init__": refuse})


EntryClass = entry_classes()
