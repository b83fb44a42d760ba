"""Packed quantized weights of every form, from a byte for each code and back to what the codes mean."""

import torch
from torch import Tensor

from qnext_plugin.checkpoint.dequantization import E2M1
from qnext_plugin.ops.cpu import packer, packing
from qnext_plugin.ops.cpu.packing import CODES, MIDDLE, Form

BFLOAT, EXPONENT, FP8 = torch.bfloat16, torch.uint8, torch.float8_e4m3fn
FORMS = [  # codes, dtype of scales, k, group, zeros
    ("u4", BFLOAT, 256, 128, False),
    ("u4", torch.float16, 192, 64, True),
    ("u4", torch.float16, 384, 128, True),
    ("u4", torch.float32, 96, 32, True),
    ("u4", BFLOAT, 70, 70, False),
    ("u4", BFLOAT, 1000, 1000, True),
    ("u4", BFLOAT, 520, 104, False),
    ("e2m1", EXPONENT, 160, 32, False),
    ("e2m1", FP8, 48, 16, False),
    ("i8", torch.float32, 300, 300, False),
    ("i8", BFLOAT, 256, 128, True),
    ("i8", torch.float16, 131, 131, True),
    ("e4m3", torch.float32, 384, 128, False),
    ("e4m3", BFLOAT, 70, 70, False),
    ("e4m3", EXPONENT, 96, 32, False),
]
IDS = ["-".join(str(part).removeprefix("torch.") for part in form) for form in FORMS]


def weights(kind, scales, k, group, has_zeros, n, *batch, seed=0):
    """Return a form and what ``pack`` takes: codes of every value, and scales that differ by group."""
    generator = torch.Generator().manual_seed(seed)
    form = packing.form(kind, scales, k, group, has_zeros)
    codes = torch.randint(16 if form.bits == 4 else 256, (*batch, n, k), generator=generator).to(torch.uint8)
    if kind == "e4m3":
        codes[(codes & 127) == 127] = 0
    shape = (*batch, n, k // group)
    scale = torch.rand(shape, generator=generator) + 0.5
    if scales == EXPONENT:
        scale = torch.randint(120, 134, shape, generator=generator)
    zeros = torch.randint(-3, 16, shape, generator=generator).to(torch.int8) if has_zeros else None
    outer = torch.rand(*batch, n, generator=generator) + 0.1 if scales == FP8 else None
    return form, codes, scale.to(scales), zeros, outer


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
