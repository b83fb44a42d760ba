"""Compiled products with weights of 4 and 8 bits on x86-64 CPUs, which are multiplied as they are packed."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from qnext_plugin.ops.cpu.packing import BLOCK, Form, dequantize


@cache
def available() -> bool:
    """Return whether these products can run here; the first call compiles them."""
    return torch.cpu._is_avx2_supported()


def products(
    form: Form,
    x: Tensor,
    packed: Tensor,
    used: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rows of ``x`` by packed matrices: the next ``counts[i]`` of the ``rows`` by matrix ``used[i]``.

    By default all rows are multiplied by the first matrix. ``x`` [T, k] is bfloat16 or float32, ``packed`` uint8
    [matrices, blocks, bytes] or [blocks, bytes], as ``packing.pack`` returns it, ``rows`` [R] int64 indices, by default
    each row once. Returns [R, blocks * BLOCK] in ``dtype``, bfloat16 or float32. Sums are in float32.
    """
    assert packed.is_contiguous() and x.shape[-1] == form.k
    n = packed.shape[-2] * BLOCK
    weights = dequantize(form, packed.view(-1, *packed.shape[-2:]), n)
    x = (x if rows is None else x[rows]).float()
    parts = zip(x.split([len(x)] if counts is None else list(counts)), used, strict=True)
    return torch.cat([part @ weights[i].T for part, i in parts]).to(dtype)


def linear(form: Form, x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Multiply ``x`` [T, k] by one matrix of ``n`` outputs, add ``bias`` and round once; returns [T, n] bfloat16."""
    if bias is None:
        return products(form, x, packed)[:, :n]
    return (products(form, x, packed, dtype=torch.float32)[:, :n] + bias).to(torch.bfloat16)
