"""Quantized weights of every stored format in one form: codes of 4 or 8 bits with scales and zero points by group.

No number is rounded on the way, so a kernel that multiplies by this form serves all formats as stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_plugin.checkpoint.dequantization import AWQ_ORDER, Stored, scale_by_group, stored_minus
from qnext_plugin.checkpoint.formats import stored_format
from qnext_plugin.checkpoint.headers import describe

PER_BYTE = {"u4": 2, "e2m1": 2, "i8": 1, "e4m3": 1}
"""How many codes of each kind a byte holds."""


@dataclass(frozen=True)
class Coded:
    """A weight [rows, in], which is ``(codes - zeros) * scales * outer``.

    ``kind`` is ``u4`` (unsigned integers), ``e2m1`` (FP4), ``i8`` (signed integers) or ``e4m3`` (FP8). ``codes`` is
    uint8 [rows, in / PER_BYTE]; of two codes in a byte the first is in the lower half. ``scales`` [rows, groups] keep
    their stored dtype; a uint8 is an exponent, ``2 ** (scale - 127)``. ``zeros`` is int8 [rows, groups]; without it the
    zero point of ``u4`` is 8, that of other kinds 0. ``outer`` is float32 [rows], or None for 1. A group is of
    consecutive inputs.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    outer: Tensor | None = None

    @property
    def group(self) -> int:
        return PER_BYTE[self.kind] * self.codes.shape[1] // self.scales.shape[1]


def coded(tensors: Stored, quantization_config: Mapping[str, Any]) -> Coded:
    """Return a module's weight from its stored tensors by the names' last segment.

    Raises ``ValueError`` saying why for a weight that has no such form; ``formats.dequantize`` serves it.
    """
    name = stored_format({leaf: describe(tensor) for leaf, tensor in tensors.items()})
    if name in ("gptq", "awq"):
        return _by_columns(tensors, 1 if name == "awq" else None, quantization_config)
    if name == "packed":
        return _packed(tensors)
    stored = tensors["weight"] if "weight" in tensors else tensors["weight_packed"]
    if name in ("fp8", "mxfp8"):
        if "weight_zero_point" in tensors and bool(tensors["weight_zero_point"].float().any()):
            raise ValueError("FP8 weights have zero points other than 0")
        return Coded("e4m3", stored.view(torch.uint8), _scales(tensors, *stored.shape))
    if name == "int8":
        zeros = tensors.get("weight_zero_point")
        zeros = None if zeros is None else _every_row(zeros, *stored.shape)
        return Coded("i8", stored.view(torch.uint8), _scales(tensors, *stored.shape), zeros)
    rows, width = stored.shape
    scales, outer = _scales(tensors, rows, 2 * width), None
    if name == "nvfp4":
        divisor, factor = tensors.get("weight_global_scale"), tensors.get("weight_scale_2")
        one = torch.ones(1) if divisor is None else 1 / divisor.float().reshape(1)
        outer = (one if factor is None else one * factor.float().reshape(1)).expand(rows)
    return Coded("e2m1", stored, scales, None, outer)


def _packed(tensors: Stored) -> Coded:
    words = tensors["weight_packed"]
    rows, columns = tensors["weight_shape"].tolist()
    bits = 32 * words.shape[1] // columns
    codes = words.contiguous().view(torch.uint8)[:, : columns * bits // 8]
    scales = _scales(tensors, rows, columns)
    _check_groups(tensors.get("weight_g_idx"), scales.shape[1])
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = _fields(zeros.T, bits)[:, :rows].T
    elif zeros is not None:
        zeros = zeros.view(torch.uint8) + 2 ** (bits - 1)  # bytes are relative to the middle of the range
        if bool((zeros >= 2**bits).any()) if bits < 8 else False:
            raise ValueError(f"a weight of {bits} bits has a zero point out of its range")
    return _integers(bits, codes, scales, None if zeros is None else _every_row(zeros, rows, columns))


def _by_columns(tensors: Stored, awq: int | None, config: Mapping[str, Any]) -> Coded:
    """Read GPTQ and AWQ, which store the transposed weight."""
    bits = 32 * tensors["qzeros"].shape[1] // tensors["scales"].shape[1]
    zeros = _fields(tensors["qzeros"], bits)
    if awq:
        codes, zeros = _awq(tensors["qweight"]), zeros.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)
    else:
        codes = tensors["qweight"].T.contiguous().view(torch.uint8)
        zeros = zeros + stored_minus(config) & 2**bits - 1
    _check_groups(tensors.get("g_idx"), len(tensors["scales"]))
    if codes.shape[1] * 8 // bits % len(tensors["scales"]):
        raise ValueError("the last group of inputs is shorter than the others")
    return _integers(bits, codes, tensors["scales"].T, zeros.T)


def _integers(bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Coded:
    """Return unsigned integers of 4 or 8 bits; those of 8 bits become signed."""
    if bits not in (4, 8):
        raise ValueError(f"it has {bits} bits")
    if bits == 4:
        return Coded("u4", codes, scales, None if zeros is None else zeros.view(torch.int8))
    return Coded("i8", codes ^ 128, scales, None if zeros is None else (zeros ^ 128).view(torch.int8))


def _fields(words: Tensor, bits: int) -> Tensor:
    """Return the integers in words or bytes of the last dimension, lowest bits first, each as a byte."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stored
    return torch.stack([stored >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1).flatten(-2)


def _awq(words: Tensor) -> Tensor:
    """Return the codes of AWQ's ``words`` [in, rows / 8], each of which has an input's codes of eight rows."""
    inputs = len(words)
    eight = F.pad(words, (0, 0, 0, -inputs % 8)).unflatten(0, (-1, 8))  # a copy, which is changed in place
    for size, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        # This transposes eight words of eight codes: it exchanges the blocks of 4x4 codes that are not on the diagonal,
        # then those of 2x2 and of 1x1 within each block.
        upper, lower = eight.unflatten(1, (-1, 2, size)).unbind(2)
        change = (upper >> 4 * size ^ lower) & mask
        lower ^= change
        upper ^= change << 4 * size
    rows = eight.index_select(1, torch.tensor(AWQ_ORDER)).permute(2, 1, 0).flatten(0, 1)
    return rows.contiguous().view(torch.uint8)[:, : inputs // 2]


def _check_groups(index: Tensor | None, groups: int) -> None:
    if index is not None and groups > 1:
        size = -(-len(index) // groups)
        if not torch.equal(index.long(), torch.arange(len(index), device=index.device) // size):
            raise ValueError("groups are not of consecutive inputs (desc_act, or g_idx in another order)")


def _scales(tensors: Stored, rows: int, columns: int) -> Tensor:
    name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    scales = tensors[name]
    return _every_row(scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales, rows, columns)


def _every_row(values: Tensor, rows: int, columns: int) -> Tensor:
    found = scale_by_group(values, rows, columns)
    if found.shape[1] == columns:
        raise ValueError(f"{columns} inputs are no multiple of a block's")
    return found.expand(rows, -1)
