"""Decoders that compute the weight of a quantized module from its stored tensors, one for each stored format.

The stored tensors are named as follows by each quantizer (``rows`` are outputs, ``in`` are inputs):

    fp8                 weight float8 [rows, in]          weight_scale_inv per 128x128 block, or weight_scale
    compressed-tensors  weight float8 or int8 [rows, in]  weight_scale per tensor, row, group of inputs or block
                        weight_packed int32 [rows, in/8]  weight_scale, weight_zero_point int32 [rows/8, groups]
                        weight_packed uint8 [rows, in/2]  weight_scale float8, weight_global_scale (divides)
    modelopt            weight uint8 [rows, in/2]         weight_scale float8, weight_scale_2 (multiplies)
    gptq                qweight int32 [in/8, rows]        scales [groups, rows], qzeros int32 [groups, rows/8], g_idx
    awq                 qweight int32 [in, rows/8]        scales [groups, rows], qzeros int32 [groups, rows/8]

``make_quantized.py`` writes each format; each of its encoders names the decoder that reads its result.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qnext_plugin.checkpoint.headers import TensorInfo, describe

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of the eight rows in an AWQ word
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Stored = Mapping[str, Tensor]
Decoder = Callable[[Stored, Mapping[str, Any]], Tensor]


def stored_format(leaves: Mapping[str, TensorInfo]) -> str:
    """Return the key in ``DECODERS`` for a quantized module. ``leaves`` are its tensors by the names' last segment."""
    if "qweight" in leaves:
        packs_inputs = leaves["qweight"].shape[1] == leaves["scales"].shape[1]
        return "gptq" if packs_inputs else "awq"
    weight = leaves["weight"] if "weight" in leaves else leaves["weight_packed"]
    return {"I32": "packed", "U8": "fp4"}.get(weight.dtype, "bytes")


def dequantize(tensors: Stored, quantization_config: Mapping[str, Any]) -> Tensor:
    """Compute a module's weight, float32 ``[rows, in]``, from its stored tensors by the names' last segment."""
    name = stored_format({leaf: describe(tensor) for leaf, tensor in tensors.items()})
    return DECODERS[name](tensors, quantization_config)


def _bytes(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    zero = tensors["weight_zero_point"].float() if "weight_zero_point" in tensors else 0.0
    return _scaled(tensors["weight"].float(), zero, tensors)


def _fp4(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    weight = tensors["weight"] if "weight" in tensors else tensors["weight_packed"]
    codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).long()
    table = [*_E2M1, *(-value for value in _E2M1)]
    return _scaled(torch.tensor(table, dtype=torch.float32, device=weight.device)[codes], 0.0, tensors)


def _packed(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    words = tensors["weight_packed"]
    rows, columns = tensors["weight_shape"].tolist()
    bits = 32 * words.shape[1] // columns
    zero: Tensor | float = 2.0 ** (bits - 1)
    if "weight_zero_point" in tensors:
        zero = unpack(tensors["weight_zero_point"].T, bits)[:, :rows].T.float()
    return _scaled(unpack(words, bits)[:, :columns].float(), zero, tensors)


def _gptq(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    bits = config["bits"]
    zeros = unpack(tensors["qzeros"], bits)
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1
    return _by_groups(unpack(tensors["qweight"].T, bits).T, zeros, tensors)


def _awq(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    bits = config["bits"] if "bits" in config else config["w_bit"]
    values, zeros = (unpack(tensors[name], bits, AWQ_ORDER) for name in ("qweight", "qzeros"))
    return _by_groups(values, zeros, tensors)


DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {"bytes": _bytes, "packed": _packed, "fp4": _fp4, "gptq": _gptq, "awq": _awq}
)
"""Each takes a module's tensors and the ``quantization_config``, and returns the float32 weight ``[rows, in]``."""

WORDS = ("packed", "gptq", "awq")
"""These are the formats that pack integers of fewer than eight bits into 32-bit words."""


def _scaled(values: Tensor, zero: Tensor | float, tensors: Stored) -> Tensor:
    """Compute ``(values - zero) * scale`` in place."""
    scale = (tensors["weight_scale_inv"] if "weight_scale_inv" in tensors else tensors["weight_scale"]).float()
    if "weight_global_scale" in tensors:
        scale = scale / tensors["weight_global_scale"].float()
    if "weight_scale_2" in tensors:
        scale = scale * tensors["weight_scale_2"].float()
    scale = _by_group(scale, values)
    groups = values.unflatten(1, (scale.shape[1], -1))  # a view, to allocate no second weight
    groups.sub_(_by_group(zero, values).unsqueeze(-1) if isinstance(zero, Tensor) else zero)
    groups.mul_(scale.unsqueeze(-1))
    return values


def _by_group(scale: Tensor, values: Tensor) -> Tensor:
    """Reshape scales of ``[rows, in]`` to ``[rows or 1, groups]``.

    They may be given per tensor, row, group of inputs or 128x128 block.
    """
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


def _by_groups(values: Tensor, zeros: Tensor, tensors: Stored) -> Tensor:
    """Compute the weight ``[rows, in]`` from ``[in, rows]`` values and ``[groups, rows]`` zero points."""
    scales, groups = tensors["scales"].float(), tensors.get("g_idx")
    if groups is None:
        groups = torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[groups.long()]) * scales[groups.long()]).T.contiguous()


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unpack int32 ``[..., words]`` to values ``[..., words * 32 // bits]``.

    ``order`` is the place of each value in its word.
    """
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> places * bits) & (1 << bits) - 1).flatten(-2)
