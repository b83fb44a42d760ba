"""Everything that depends on the version of SGLang."""

from typing import Any

from sglang.srt.platforms import current_platform

ON_CPU: bool = current_platform.device_type == "cpu"
"""Whether this process computes on a CPU, and so with kernels of ours."""


def check_platform() -> None:
    """``ValueError`` where a CPU is to compute without the platform that brings the kernels for it."""
    if ON_CPU and type(current_platform).__module__ != "sglang_ext.cpu.platform":
        raise ValueError(
            f"the platform is {type(current_platform).__name__}, expected qnext-plugin's own to compute on this CPU; "
            "unset SGLANG_USE_CPU_ENGINE and SGLANG_PLATFORM, or set QNEXT_DISABLE=1 to serve SGLang's own model"
        )


def unpadded(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the checkpoint has it.

    On CPU SGLang 0.5.23 pads sizes for its AMX kernels in place (``adjust_config_with_unaligned_cpu_tp``), keeping the
    originals beside them. It can go when that leaves out-of-tree platforms alone.
    """
    prefix = "original_"
    originals = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if "total_num_kv_heads" in originals:
        originals["num_key_value_heads"] = originals.pop("total_num_kv_heads")
    return values | {name: value for name, value in originals.items() if name in values}


def bind_topk(topk: Any, experts: Any) -> None:
    """Tell the router which kernels run the experts, whose input it prepares.

    SGLang 0.5.22 asks the server's arguments instead. The question can go with its support.
    """
    if hasattr(topk, "bind_runner_backend"):
        topk.bind_runner_backend(experts.runner_backend, routing_method_type=experts.routing_method_type)


def is_prefill_alone(forward_batch: Any) -> bool:
    """Whether the linear-attention kernels run on prompts only, also where a decode step is labelled as one.

    SGLang 0.5.22 does not say, so False there. ``logical_forward_mode`` is enough when its support goes.
    """
    mode = getattr(forward_batch, "logical_forward_mode", None)
    return mode is not None and bool(mode.is_extend_without_speculative())


def uses_expert_location(experts: Any) -> bool:
    """Whether a layer's experts are where the load balancer wants them, which those of a draft are not.

    SGLang 0.5.22 makes no difference. The question can go with its support.
    """
    return bool(getattr(experts, "uses_expert_location", True))
