"""Registers the trunk and its draft under their architectures' names."""

try:
    from sglang_ext.model import Qwen3NextForCausalLM
    from sglang_ext.mtp import Qwen3NextForCausalLMMTP
except Exception as e:
    # The registry would log this and go on with SGLang's own model.
    raise SystemExit(
        f"qnext-plugin cannot import its model ({type(e).__name__}: {e}); install a supported SGLang, or set "
        "QNEXT_DISABLE=1 to serve SGLang's own model"
    ) from e

EntryClass = [Qwen3NextForCausalLM, Qwen3NextForCausalLMMTP]
