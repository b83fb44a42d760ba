"""Compute the float32 weight of a module from its stored tensors, for each way in which a format packs numbers.

``formats.py`` says which tensors each format has.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from qnext_plugin.checkpoint.layouts import FP8_BLOCK

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of the eight rows in an AWQ word
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The FP4 numbers, by code."""
Stored = Mapping[str, Tensor]


def scale_name(leaves: Container[str]) -> str:
    """Return the name of a module's scale, except in the formats of GPTQ and AWQ."""
    return "weight_scale_inv" if "weight_scale_inv" in leaves else "weight_scale"


def dequantize_bytes(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    """Compute a weight that is stored as FP8 or int8."""
    zero = tensors["weight_zero_point"].float() if "weight_zero_point" in tensors else 0.0
    return _scaled(tensors["weight"].float(), zero, tensors)


def dequantize_fp4(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    """Compute a weight of which a byte stores two FP4 numbers."""
    weight = tensors["weight"] if "weight" in tensors else tensors["weight_packed"]
    codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).long()
    return _scaled(torch.tensor(E2M1, dtype=torch.float32, device=weight.device)[codes], 0.0, tensors)


def dequantize_words(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    """Compute a weight whose integers compressed-tensors packs into int32."""
    words = tensors["weight_packed"]
    rows, columns = tensors["weight_shape"].tolist()
    bits = 32 * words.shape[1] // columns
    zero: Tensor | float = 2.0 ** (bits - 1)
    if "weight_zero_point" in tensors:
        zero = tensors["weight_zero_point"]
        # Bytes are relative to the middle of the range, words are not.
        zero = zero + 2.0 ** (bits - 1) if zero.dtype == torch.int8 else unpack(zero.T, bits)[:, :rows].T.float()
        if zero.amin() < 0 or zero.amax() >= 2**bits:
            raise ValueError(f"a weight of {bits} bits has a zero point out of its range")
    return _scaled(unpack(words, bits)[:, :columns].float(), zero, tensors)


def dequantize_gptq(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    """Compute a weight that GPTQ packs along its inputs; ``config`` is the ``quantization_config``."""
    bits = 32 * tensors["qzeros"].shape[1] // tensors["scales"].shape[1]
    zeros = unpack(tensors["qzeros"], bits) + stored_minus(config) & 2**bits - 1
    return _by_groups(unpack(tensors["qweight"].T, bits).T, zeros, tensors)


def stored_minus(quantization_config: Mapping[str, Any]) -> int:
    """Return what was subtracted from the zero points in ``qzeros``; raises ``ValueError`` if that is not known."""
    form = str(quantization_config.get("packing_format") or quantization_config.get("checkpoint_format") or "gptq")
    offsets = {"gptq": 1, "auto_gptq": 1, "gptq_v2": 0, "gptqmodel": 0}
    name = form.removeprefix("auto_round:")
    if name not in offsets:
        raise ValueError(f"the packing format of GPTQ is {form!r}, expected one of {', '.join(offsets)}")
    return offsets[name]


def dequantize_awq(tensors: Stored, config: Mapping[str, Any]) -> Tensor:
    """Compute a weight that AWQ packs along its outputs, in ``AWQ_ORDER``."""
    values, zeros = (unpack(tensors[name], 4, AWQ_ORDER) for name in ("qweight", "qzeros"))
    return _by_groups(values, zeros, tensors)


def _scaled(values: Tensor, zero: Tensor | float, tensors: Stored) -> Tensor:
    """Compute ``(values - zero) * scale`` in place."""
    scale = tensors[scale_name(tensors)]
    # float8_e8m0 holds the same bytes, but not every operation knows the dtype.
    is_exponent = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    scale = torch.exp2(scale.view(torch.uint8).float() - 127) if is_exponent else scale.float()
    if "weight_global_scale" in tensors:
        scale = scale / tensors["weight_global_scale"].float()
    if "weight_scale_2" in tensors:
        scale = scale * tensors["weight_scale_2"].float()
    scale = scale_by_group(scale, *values.shape)
    if "weight_g_idx" in tensors and scale.shape[1] > 1:  # groups are not of consecutive inputs
        group = tensors["weight_g_idx"].long()
        zero = zero[:, group] if isinstance(zero, Tensor) else zero
        return values.sub_(zero).mul_(scale[:, group])
    groups = values.unflatten(1, (scale.shape[1], -1))  # a view, to allocate no second weight
    groups.sub_(scale_by_group(zero, *values.shape).unsqueeze(-1) if isinstance(zero, Tensor) else zero)
    groups.mul_(scale.unsqueeze(-1))
    return values


def scale_by_group(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Reshape scales of ``[rows, in]`` to ``[rows or 1, groups]``.

    They may be given per tensor, row, group of inputs or 128x128 block.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 4:  # ModelOpt's blocks
        scale = scale[:, 0, :, 0]
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(FP8_BLOCK, 0)[:rows]
        if columns % FP8_BLOCK:
            scale = scale.repeat_interleave(FP8_BLOCK, 1)[:, :columns]
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
