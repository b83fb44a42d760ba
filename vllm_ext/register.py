"""The entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes."""

import logging
import os
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from qnext_plugin import __version__

if TYPE_CHECKING:
    from qnext_plugin.engines.versions import Verdict

TESTED = ">=0.32,<0.34"
"""The versions of vLLM that this package is tested with."""

MODULES = ("vllm_ext.model", "vllm_ext.mtp")
ARCHITECTURES = {name: f"vllm_ext:{name}" for name in ("Qwen3NextForCausalLM", "Qwen3NextMTP")}


def verdict() -> "Verdict":
    """Return whether our classes can serve with this version of vLLM on this platform."""
    import vllm
    from vllm.platforms import current_platform

    from qnext_plugin.engines.versions import judge, refuse_platform

    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return refuse_platform("vllm", type(current_platform).__name__)
    return judge("vllm", vllm.__version__, TESTED, MODULES)


def register() -> None:
    """Replace vLLM's own classes for this architecture by ours, if ours can serve; idempotent."""
    logger = logging.getLogger("vllm.qnext_plugin")
    if os.environ.get("QNEXT_DISABLE", "0") not in ("", "0"):
        logger.info("qnext-plugin %s: off, QNEXT_DISABLE is set", __version__)
        return
    found = verdict()
    if found.message and parent_process() is None:
        logger.log(logging.WARNING if found.serves else logging.ERROR, found.message)
    if not found.serves:
        return
    import vllm

    logging.getLogger("qnext_plugin").parent = logger  # what is not below vLLM's own logger is not logged
    for architecture, target in ARCHITECTURES.items():
        vllm.ModelRegistry.register_model(architecture, target)
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_ext.config import CheckedConfig, Qwen3NextConfig

    AutoConfig.register(Qwen3NextConfig.model_type, Qwen3NextConfig, exist_ok=True)
    MODELS_CONFIG_MAP.setdefault("Qwen3NextForCausalLM", CheckedConfig)  # vLLM has no entry for it
    logger.info("qnext-plugin %s: %s registered from vllm_ext", __version__, ", ".join(ARCHITECTURES))
