"""The entry points: SGLang calls ``register`` in each of its processes, and ``platform`` when it first needs one."""

import logging
import os
import sys
from importlib.metadata import entry_points
from multiprocessing import parent_process
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext_plugin.engines.versions import Verdict

TESTED = ">=0.5.22,<0.5.24"
"""The versions of SGLang that this package is tested with."""

MODULES = ("sglang_ext.model", "sglang_ext.mtp")
MODELS = "sglang_ext.models"
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
REGISTRY = "sglang.srt.models.registry"
PLATFORMS = "sglang.srt.platforms"
PLATFORM_MODULE = "sglang_ext.cpu.platform"
CPU_PLATFORM = f"{PLATFORM_MODULE}:CpuPlatform"

logger = logging.getLogger(__name__)


def disabled() -> bool:
    return os.environ.get("QNEXT_DISABLE", "0") not in ("", "0")


def verdict() -> "Verdict":
    """Return whether our classes can serve with this version of SGLang on this platform."""
    from sglang.srt.platforms import current_platform

    from qnext_plugin.engines.versions import refuse_platform

    if not (current_platform.is_cuda() or current_platform.device_type == "cpu"):
        return refuse_platform("sglang", type(current_platform).__name__)
    return version_verdict(MODULES)


def version_verdict(modules: tuple[str, ...]) -> "Verdict":
    """Return whether our ``modules`` can serve with this version of SGLang, which may not be fully imported yet."""
    from sglang.version import __version__ as engine_version

    from qnext_plugin.engines.versions import judge

    return judge("sglang", engine_version, TESTED, modules)


def register() -> None:
    """Replace SGLang's configuration and model of this architecture by ours, if ours can serve; idempotent.

    SGLang logs other errors of a plugin and goes on with its own model; ``SystemExit`` ends the process instead.
    """
    if disabled():
        logger.info("qnext-plugin: off (QNEXT_DISABLE is set); SGLang's own model serves")
        return
    found = verdict()
    if found.message and parent_process() is None:
        logger.log(logging.WARNING if found.serves else logging.ERROR, found.message)
    if not found.serves:
        return
    if platform() and not entry_points(group=PLATFORMS):
        raise SystemExit(
            "qnext-plugin: there is no accelerator, and the distribution with the CPU platform is not installed; "
            "install it (qnext-plugin-sglang-cpu, the folder sglang_cpu of the repository)"
        )
    try:
        register_config()
        register_models()
        register_kernels()
    except Exception as e:
        raise SystemExit(
            f"qnext-plugin cannot register with this SGLang ({type(e).__name__}: {e}); install a supported one, or "
            "set QNEXT_DISABLE=1 to serve SGLang's own model"
        ) from e


def register_config() -> None:
    from sglang.srt.utils.hf_transformers import common

    from sglang_ext.config import Qwen3NextConfig

    common._CONFIG_REGISTRY[Qwen3NextConfig.model_type] = Qwen3NextConfig
    common.AutoConfig.register(Qwen3NextConfig.model_type, Qwen3NextConfig, exist_ok=True)


def register_models() -> None:
    """Name our models as SGLang's external package, which its registry prefers and reads when it loads a model.

    Importing the registry here instead would import every model of SGLang in processes that need none.
    """
    package = os.environ.setdefault(MODELS_VARIABLE, MODELS)
    if package == MODELS and REGISTRY not in sys.modules:
        return
    # The user has named another package, or the registry has already read the variable.
    from sglang.srt.models.registry import ModelRegistry, import_model_classes

    ModelRegistry.models.update(import_model_classes(MODELS, strict=True))


def register_kernels() -> None:
    """Let ``--linear-attn-prefill-backend`` name the packages whose kernels we call."""
    from sglang.srt.arg_groups.choices import LINEAR_ATTN_KERNEL_BACKEND_CHOICES, add_linear_attn_kernel_backend_choices

    from qnext_plugin.ops.packages import CHOICES

    add_linear_attn_kernel_backend_choices(name for name in CHOICES if name not in LINEAR_ATTN_KERNEL_BACKEND_CHOICES)


def platform() -> str | None:
    """Return our CPU platform, unless there is an accelerator or the user requests SGLang's own CPU engine."""
    import torch

    own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    if disabled() or own_engine or torch.accelerator.is_available():
        return None
    return CPU_PLATFORM if version_verdict((PLATFORM_MODULE,)).serves else None
