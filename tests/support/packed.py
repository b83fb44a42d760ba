"""Packed quantized weights, from a byte for each code and back to what the codes mean."""

import torch
from torch import Tensor

from qnext_plugin.checkpoint.formats import E2M1
from qnext_plugin.ops.cpu import packer, packing
from qnext_plugin.ops.cpu.packing import CODES, MIDDLE, Form


def pack(form: Form, codes: Tensor, *rest: Tensor | None) -> Tensor:
    """Return what ``packer.pack`` makes of ``codes`` [..., n, k], a byte for each."""
    return packer.pack(form, codes[..., ::2] | codes[..., 1::2] << 4 if form.bits == 4 else codes, *rest)


def each_in_a_byte(form: Form, codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2) if form.bits == 4 else codes


def dequantize(form: Form, packed: Tensor, n: int) -> Tensor:
    """Return the float32 weights [..., n, k] of a packed matrix."""
    codes, scales, zeros, outer = packing.unpack(form, packed, n)
    kind, codes = CODES[form.codes], each_in_a_byte(form, codes)
    if kind == "e2m1":
        values = torch.tensor(E2M1, dtype=torch.float32)[codes.long()]
    else:
        values = codes.view({"u4": torch.uint8, "i8": torch.int8, "e4m3": torch.float8_e4m3fn}[kind]).float()
    values = values.unflatten(-1, (form.groups, form.group))
    if zeros is not None:
        values = values - zeros.float()[..., None]
    elif kind == "u4":
        values = values - MIDDLE
    factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    if outer is not None:
        factors = factors * outer[..., None]
    return (values * factors[..., None]).flatten(-2)
