"""Find out from its headers how a checkpoint stores each linear module (the formats are in ``formats.py``)."""

from collections.abc import Mapping
from typing import Any

from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.schema import CACHE_SCALES, FLOAT_DTYPES, PACKED_WEIGHTS, QUANT_COMPANIONS

Leaves = Mapping[str, TensorInfo]

_WEIGHTS = frozenset(("weight", *PACKED_WEIGHTS))
SCALES = ("weight_scale_inv", "weight_scale", "scales")


def layout_method(quantization_config: Mapping[str, Any]) -> str:
    """Return the checkpoint's ``quant_method`` as ``layouts.LAYOUTS`` names it."""
    if "quantization" in quantization_config:  # ModelOpt's hf_quant_config.json
        return "modelopt"
    method = str(quantization_config.get("quant_method")).lower()
    if method in ("auto-round", "intel/auto-round"):
        method = str(quantization_config.get("packing_format", "auto_gptq")).rpartition("auto_")[2]
    return "modelopt" if method.startswith("modelopt") else method


def stored_modules(headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors that hold each module's weight, by module name and the last segment of the tensor's name."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _WEIGHTS or (leaf in QUANT_COMPANIONS and leaf not in CACHE_SCALES):
            modules.setdefault(module, {})[leaf] = info
    return modules


def is_quantized(leaves: Leaves) -> bool:
    """Return whether a module is stored as anything other than a plain floating-point weight."""
    return "weight" not in leaves or leaves["weight"].dtype not in FLOAT_DTYPES


def storage(leaves: Leaves) -> str:
    """Describe the stored tensors, to compare and to show: ``weight F8_E4M3, weight_scale_inv BF16``."""
    return ", ".join(f"{leaf} {info.dtype}" for leaf, info in sorted(leaves.items()))


def check_quantization(headers: Mapping[str, TensorInfo], quantization_config: Mapping[str, Any] | None) -> None:
    """Raise a ``ValueError`` that lists the modules whose stored tensors are incomplete or mixed.

    These have no scale, no weight or two weights, or experts of one layer are stored in different ways. Also raises
    ``ValueError`` if tensors are quantized and ``config.json`` has no ``quantization_config``.
    """
    modules = stored_modules(headers)
    quantized = {name: leaves for name, leaves in modules.items() if is_quantized(leaves)}
    if quantized and quantization_config is None:
        name, leaves = next(iter(quantized.items()))
        raise ValueError(
            f"checkpoint is quantized ({name}: {storage(leaves)}), but config.json has no quantization_config; "
            "take config.json from where the weights came from"
        )
    problems = [
        listing("without a scale", [n for n, leaves in quantized.items() if not set(leaves) & set(SCALES)]),
        listing("with two weights", [n for n, leaves in modules.items() if len(set(leaves) & _WEIGHTS) > 1]),
        listing("without a weight", [n for n, leaves in modules.items() if not set(leaves) & _WEIGHTS]),
        listing("experts of one layer stored in different ways:", _unlike_experts(modules)),
    ]
    if any(problems):
        raise ValueError(
            "\n".join(["quantized checkpoint is incomplete or mixed:", *filter(None, problems), "download it again"])
        )


def _unlike_experts(modules: Mapping[str, Leaves]) -> list[str]:
    found: dict[str, dict[str, str]] = {}
    for name, leaves in modules.items():
        layer, _, expert = name.partition(".experts.")
        if expert:
            found.setdefault(f"{layer}.experts", {}).setdefault(storage(leaves), name)
    return [
        f"{layer} (" + "; ".join(f"{name}: {how}" for how, name in examples.items()) + ")"
        for layer, examples in found.items()
        if len(examples) > 1
    ]
