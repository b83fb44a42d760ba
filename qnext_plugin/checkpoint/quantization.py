"""Find out from its headers how a checkpoint stores each linear module (the formats are in ``formats.py``)."""

from collections.abc import Mapping
from typing import Any

from qnext_plugin.checkpoint.dequantization import stored_minus
from qnext_plugin.checkpoint.formats import Leaves, problem, stored_format
from qnext_plugin.checkpoint.headers import Shape, TensorInfo
from qnext_plugin.checkpoint.layouts import LAYOUTS
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.merged import PARTS
from qnext_plugin.checkpoint.schema import FLOAT_DTYPES, PACKED_WEIGHTS, QUANT_COMPANIONS

WEIGHTS = frozenset(("weight", *PACKED_WEIGHTS))
SCALES = ("weight_scale_inv", "weight_scale", "scales")


def stored_modules(headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors that hold each module's weight, by module name and the last segment of the tensor's name."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in WEIGHTS or leaf in QUANT_COMPANIONS:
            modules.setdefault(module, {})[leaf] = info
    return modules


def is_quantized(leaves: Leaves) -> bool:
    """Return whether a module is stored as anything other than a plain floating-point weight."""
    return "weight" not in leaves or leaves["weight"].dtype not in FLOAT_DTYPES


def storage(leaves: Leaves) -> str:
    """Describe the stored tensors: ``weight F8_E4M3 [512, 256], weight_scale_inv BF16 [4, 2]``."""
    return ", ".join(f"{leaf} {info.dtype} {list(info.shape)}" for leaf, info in sorted(leaves.items()))


def of_one_row(leaves: Leaves) -> tuple[tuple[str, str, Shape], ...]:
    """Return the dtype and shape of one row of each stored tensor; equal for modules that can be merged as stored."""
    return tuple(
        (
            leaf,
            info.dtype,
            info.shape[:axis] + info.shape[axis + 1 :] if (axis := LAYOUTS[leaf].axis) is not None else (),
        )
        for leaf, info in sorted(leaves.items())
    )


def check_quantization(
    headers: Mapping[str, TensorInfo], quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, Shape]
) -> None:
    """Raise a ``ValueError`` that lists the modules that cannot be read, or not all in the same way.

    These have no scale, no weight or two weights, their tensors fit no known format or ``shapes``, those of the whole
    weights by name, or experts of one layer are stored in different ways. Also raises ``ValueError`` for quantized
    tensors without a ``quantization_config``, and for one whose meaning for all weights is not known.
    """
    modules = stored_modules(headers)
    quantized = {name: leaves for name, leaves in modules.items() if is_quantized(leaves)}
    if quantized and quantization_config is None:
        name, leaves = next(iter(quantized.items()))
        raise ValueError(
            f"checkpoint is quantized ({name}: {storage(leaves)}), but config.json has no quantization_config; "
            "take config.json from where the weights came from"
        )
    odd = [
        listing("without a scale", [n for n, leaves in quantized.items() if not set(leaves) & set(SCALES)]),
        listing("with two weights", [n for n, leaves in modules.items() if len(set(leaves) & WEIGHTS) > 1]),
        listing("without a weight", [n for n, leaves in modules.items() if not set(leaves) & WEIGHTS]),
        listing("experts of one layer stored in different ways:", _unlike_experts(modules)),
    ]
    if any(odd):
        raise ValueError(
            "\n".join(["quantized checkpoint is incomplete or mixed:", *filter(None, odd), "download it again"])
        )
    _check_formats(quantized, quantization_config or {}, shapes)


def _check_formats(
    quantized: Mapping[str, Leaves], quantization_config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> None:
    unknown: dict[str, list[str]] = {}
    for name, leaves in quantized.items():
        shape = shapes.get(f"{name}.weight")
        if shape is not None and (found := problem(leaves, shape)):
            unknown.setdefault(found, []).append(name)
    if unknown:
        lines = [listing(f"{found}:", names) for found, names in unknown.items()]
        advice = "take one in another format, or convert it to a format in docs/quantization.md"
        raise ValueError("\n".join(["quantized checkpoint is in a format that is not known:", *lines[:8], advice]))
    if any(stored_format(leaves) == "gptq" for leaves in quantized.values()):
        stored_minus(quantization_config)
    if quantization_config.get("transform_config"):
        raise ValueError(
            "quantization_config has a transform_config: hidden states have to be transformed as the weights were, "
            "which is not done here; take a checkpoint without transforms (Hadamard, SpinQuant, QuIP)"
        )


def _unlike_experts(modules: Mapping[str, Leaves]) -> list[str]:
    found: dict[tuple[str, str], dict[object, str]] = {}
    for name, leaves in modules.items():
        layer, _, expert = name.partition(".experts.")
        if expert:
            merged = PARTS.get(expert.rpartition(".")[2], (expert.rpartition(".")[2],))[0]
            found.setdefault((f"{layer}.experts", merged), {}).setdefault(of_one_row(leaves), name)
    return [
        f"{layer} (" + "; ".join(f"{name}: {storage(modules[name])}" for name in examples.values()) + ")"
        for (layer, _), examples in found.items()
        if len(examples) > 1
    ]
