"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes."""

import logging
import os

ARCHITECTURES = {name: f"vllm_ext:{name}" for name in ("Qwen3NextForCausalLM", "Qwen3NextMTP")}


def register() -> None:
    """Put our classes in the place of vLLM's own for this architecture; idempotent, imports nothing new."""
    if os.environ.get("QNEXT_DISABLE", "0") not in ("", "0"):
        logging.getLogger("vllm.qnext_plugin").info("qnext-plugin: off (QNEXT_DISABLE is set); vLLM's own model serves")
        return
    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
