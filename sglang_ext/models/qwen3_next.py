"""Registers the trunk and its draft under their architectures' names.

Every SGLang server in this environment imports this, whatever it serves. Where our model cannot be imported, servers of
other models go on; one of this architecture ends when it makes the model, and not with SGLang's own in its place.
"""

from typing import Any

from torch import nn

try:
    from sglang_ext.model import Qwen3NextForCausalLM
    from sglang_ext.mtp import Qwen3NextForCausalLMMTP
except Exception as e:
    failure = e

    def fail(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"qnext-plugin cannot import its model ({type(failure).__name__}: {failure}); install a supported SGLang, "
            "or set QNEXT_DISABLE=1 to serve SGLang's own model"
        ) from failure

    Qwen3NextForCausalLM, Qwen3NextForCausalLMMTP = (
        type(name, (nn.Module,), {"__init__": fail}) for name in ("Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP")
    )

EntryClass = [Qwen3NextForCausalLM, Qwen3NextForCausalLMMTP]
