"""How a checkpoint stores each linear module, read from its headers, and the plain weight of a quantized one.

Names of stored tensors, by what wrote them (``rows`` are outputs, ``in`` inputs):

    fp8                 weight float8 [rows, in]          weight_scale_inv per 128x128 block, or weight_scale
    compressed-tensors  weight float8 or int8 [rows, in]  weight_scale per tensor, row, group of inputs or block
                        weight_packed int32 [rows, in/8]  weight_scale, weight_zero_point int32 [rows/8, groups]
                        weight_packed uint8 [rows, in/2]  weight_scale float8, weight_global_scale (divides)
    modelopt            weight uint8 [rows, in/2]         weight_scale float8, weight_scale_2 (multiplies)
    gptq                qweight int32 [in/8, rows]        scales [groups, rows], qzeros int32 [groups, rows/8], g_idx
    awq                 qweight int32 [in, rows/8]        scales [groups, rows], qzeros int32 [groups, rows/8]
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.schema import CACHE_SCALES, FLOAT_DTYPES, PACKED_WEIGHTS, QUANT_COMPANIONS

Leaves = Mapping[str, TensorInfo]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in an AWQ word of each of its eight rows
_WEIGHTS = frozenset(("weight", *PACKED_WEIGHTS))
SCALES = ("weight_scale_inv", "weight_scale", "scales")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def layout_method(quantization_config: Mapping[str, Any]) -> str:
    """The checkpoint's ``quant_method`` as ``layouts.LAYOUTS`` names it."""
    if "quantization" in quantization_config:  # ModelOpt's hf_quant_config.json
        return "modelopt"
    method = str(quantization_config.get("quant_method")).lower()
    if method in ("auto-round", "intel/auto-round"):
        method = str(quantization_config.get("packing_format", "auto_gptq")).rpartition("auto_")[2]
    return "modelopt" if method.startswith("modelopt") else method


def stored_modules(headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """By module name, the tensors that hold its weight, by the last segment of their names."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _WEIGHTS or (leaf in QUANT_COMPANIONS and leaf not in CACHE_SCALES):
            modules.setdefault(module, {})[leaf] = info
    return modules


def is_quantized(leaves: Leaves) -> bool:
    """Whether a module's tensors hold anything but a plain floating-point weight."""
    return "weight" not in leaves or leaves["weight"].dtype not in FLOAT_DTYPES


def storage(leaves: Leaves) -> str:
    """What is stored, to compare modules and to show: ``weight F8_E4M3, weight_scale_inv BF16``."""
    return ", ".join(f"{leaf} {info.dtype}" for leaf, info in sorted(leaves.items()))


def check_quantization(headers: Mapping[str, TensorInfo], quantization_config: Mapping[str, Any] | None) -> None:
    """``ValueError`` that lists the modules without a scale, with two weights, or of unlike experts in one layer.

    Also where tensors are quantized and ``config.json`` has no ``quantization_config``.
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


def dequantize(tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Tensor:
    """A module's weight, float32 ``[rows, in]``, from its stored tensors by the last segment of their names."""
    if "qweight" in tensors:
        return _from_words(tensors, quantization_config)
    weight = tensors["weight"] if "weight" in tensors else tensors["weight_packed"]
    scale = tensors["weight_scale_inv"] if "weight_scale_inv" in tensors else tensors["weight_scale"]
    if weight.dtype == torch.int32:
        rows, columns = tensors["weight_shape"].tolist()
        bits = 32 * weight.shape[1] // columns
        values = unpack(weight, bits)[:, :columns].float()
        zero: Tensor | float = 2.0 ** (bits - 1)
        if "weight_zero_point" in tensors:
            zero = unpack(tensors["weight_zero_point"].T, bits)[:, :rows].T.float()
    else:
        values = _from_fp4(weight) if weight.dtype == torch.uint8 else weight.float()
        zero = tensors["weight_zero_point"].float() if "weight_zero_point" in tensors else 0.0
    scale = scale.float()
    if "weight_global_scale" in tensors:
        scale = scale / tensors["weight_global_scale"].float()
    if "weight_scale_2" in tensors:
        scale = scale * tensors["weight_scale_2"].float()
    scale = _by_group(scale, values)
    groups = values.unflatten(1, (scale.shape[1], -1))  # a view, so that nothing of the weight's size is allocated
    groups.sub_(_by_group(zero, values).unsqueeze(-1) if isinstance(zero, Tensor) else zero)
    groups.mul_(scale.unsqueeze(-1))
    return values


def _by_group(scale: Tensor, values: Tensor) -> Tensor:
    """Bring scales per tensor, row, group of inputs or 128x128 block of ``[rows, in]`` to ``[rows or 1, groups]``."""
    rows, columns = values.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 4:  # ModelOpt's blocks
        scale = scale[:, 0, :, 0]
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(128, 0)[:rows]
        if columns % 128:
            scale = scale.repeat_interleave(128, 1)[:, :columns]
    return scale


def _from_words(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    bits = config["bits"] if "bits" in config else config["w_bit"]
    words, scales = tensors["qweight"], tensors["scales"].float()
    if words.shape[1] == scales.shape[1]:  # GPTQ packs the inputs
        values = unpack(words.T, bits).T
        zeros = unpack(tensors["qzeros"], bits)
        if config.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = zeros + 1
    else:
        values, zeros = (unpack(tensors[name], bits, AWQ_ORDER) for name in ("qweight", "qzeros"))
    groups = tensors.get("g_idx")
    if groups is None:
        groups = torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[groups.long()]) * scales[groups.long()]).T.contiguous()


def _from_fp4(weight: Tensor) -> Tensor:
    codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).long()
    table = [*_E2M1, *(-value for value in _E2M1)]
    return torch.tensor(table, dtype=torch.float32, device=weight.device)[codes]


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 ``[..., words]`` to values ``[..., words * 32 // bits]``; ``order`` is each value's place in its word."""
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> places * bits) & (1 << bits) - 1).flatten(-2)
