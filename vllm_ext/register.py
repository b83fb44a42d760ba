"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes."""

import logging
import os
from multiprocessing import parent_process

from qnext_plugin import __version__

TESTED = ">=0.32,<0.34"
"""The versions of vLLM that this package is tested with."""

ARCHITECTURES = {name: f"vllm_ext:{name}" for name in ("Qwen3NextForCausalLM", "Qwen3NextMTP")}


def register() -> None:
    """Put our classes in the place of vLLM's own for this architecture; idempotent.

    Outside the tested range only where vLLM has everything that they use; else its own model stays.
    """
    logger = logging.getLogger("vllm.qnext_plugin")
    if os.environ.get("QNEXT_DISABLE", "0") not in ("", "0"):
        logger.info("qnext-plugin %s: off, QNEXT_DISABLE is set", __version__)
        return
    import vllm

    from qnext_plugin.coupling.policy import judge

    verdict = judge("vllm_ext", "vllm", vllm.__version__, TESTED)
    if verdict.message and parent_process() is None:
        logger.log(logging.WARNING if verdict.serves else logging.ERROR, verdict.message)
    if not verdict.serves:
        return
    for architecture, target in ARCHITECTURES.items():
        vllm.ModelRegistry.register_model(architecture, target)
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_ext.config import CheckedConfig

    MODELS_CONFIG_MAP.setdefault("Qwen3NextForCausalLM", CheckedConfig)  # vLLM has none of its own
    logger.info("qnext-plugin %s: %s registered from vllm_ext", __version__, ", ".join(ARCHITECTURES))
