"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes."""

import logging
import os

from qnext_plugin import __version__

ARCHITECTURES = {name: f"vllm_ext:{name}" for name in ("Qwen3NextForCausalLM", "Qwen3NextMTP")}


def register() -> None:
    """Put our classes in the place of vLLM's own for this architecture; idempotent, imports nothing new."""
    logger = logging.getLogger("vllm.qnext_plugin")
    if os.environ.get("QNEXT_DISABLE", "0") not in ("", "0"):
        logger.info("qnext-plugin %s: off, QNEXT_DISABLE is set", __version__)
        return
    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
    logger.info("qnext-plugin %s: %s registered from vllm_ext", __version__, ", ".join(ARCHITECTURES))
