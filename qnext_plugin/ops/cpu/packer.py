"""Weights are packed by a compiled loop, in the layout that ``packing.py`` describes."""

from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import carray, njit
from torch import Tensor

from qnext_plugin.ops.cpu import pages
from qnext_plugin.ops.cpu.jit import in_parallel, pointer, share
from qnext_plugin.ops.cpu.packing import BLOCK, CODES, SCALES, Form

E4M3, I8 = CODES.index("e4m3"), CODES.index("i8")
FIELDS = (
    *("blocks", "codes", "scale_bytes", "groups", "lines", "is_nan"),
    *("outer", "scales", "zeros", "weights", "packed", "scales_at", "zeros_at", "codes_at", "block_bytes"),
)
HEADER = np.dtype([(field, np.int64) for field in FIELDS])
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pack(form: Form, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, outer: Tensor | None = None) -> Tensor:
    """Pack ``codes`` uint8 [..., n, k * bits / 8] for ``quantized.products``.

    Of two codes in a byte the first is in the lower half. ``scales`` [..., n, groups] have the form's dtype, ``zeros``
    [..., n, groups] are int8, ``outer`` [..., n] float32; the last two are given if and only if the form has them.
    Outputs that fill the last block are 0. Returns uint8 [..., blocks, bytes]: matrices whose ``n`` is a multiple of
    BLOCK can be concatenated after packing, others before. Raises ``ValueError`` for NaN among FP8 codes.
    """
    *batch, n, width = codes.shape
    assert 8 * width == form.bits * form.k
    assert scales.dtype == SCALES[form.scales] and scales.shape == (*batch, n, form.groups)
    assert (zeros is not None) == (form.has_zeros == 1)
    assert (outer is not None) == (scales.dtype == torch.float8_e4m3fn)
    lines = form.padded_k // form.per_line
    factors = None if outer is None else outer[..., None]
    sections = ((factors, 1), (scales, form.groups), (zeros, form.groups), (codes, 4 * lines))
    sources = [None if section is None else _padded(section, columns) for section, columns in sections]
    packed = pages.empty((*batch, *form.packed_shape(n)), torch.uint8).zero_()
    sizes = (prod(packed.shape[:-1]), form.codes, scales.itemsize, form.groups, lines, 0)
    addresses = (0 if source is None else source.data_ptr() for source in (*sources, packed))
    header = np.array([*sizes, *addresses, *form.offsets[:-1], packed.shape[-1]], np.int64)
    run = in_parallel(_region)
    assert run is not None
    run(header)
    if header[FIELDS.index("is_nan")]:
        raise ValueError("an FP8 weight is NaN: the checkpoint is damaged")
    return packed


def _padded(section: Tensor, columns: int) -> Tensor:
    """Return a contiguous ``section`` [..., n, at most columns], with zeros up to ``columns`` and whole blocks."""
    *_, n, width = section.shape
    plain = section.contiguous().view(INTEGERS[section.itemsize])
    return plain if width == columns and n % BLOCK == 0 else F.pad(plain, (0, columns - width, 0, -n % BLOCK))


def _region(data: Any) -> None:
    """Pack one thread's share of the blocks of all matrices."""
    h = carray(data, 1, HEADER)[0]
    first, last = share(h.blocks)
    for block in range(first, last):
        row, to = BLOCK * block, h.packed + h.block_bytes * block
        if h.outer:
            _transpose(h.outer + 4 * row, 1, to, np.uint32)
        scales = h.scales + h.scale_bytes * h.groups * row
        if h.scale_bytes == 1:
            _transpose(scales, h.groups, to + h.scales_at, np.uint8)
        elif h.scale_bytes == 2:
            _transpose(scales, h.groups, to + h.scales_at, np.uint16)
        else:
            _transpose(scales, h.groups, to + h.scales_at, np.uint32)
        if h.zeros:
            _transpose(h.zeros + h.groups * row, h.groups, to + h.zeros_at, np.uint8)
        weights, lines = h.weights + 4 * h.lines * row, to + h.codes_at
        if h.codes == E4M3:
            if _has_nan(weights, 4 * BLOCK * h.lines):
                h.is_nan = 1
            _transpose(weights, 2 * h.lines, lines, np.uint16)
        else:
            _transpose(weights, h.lines, lines, np.uint32)
            _order_lines(lines, h.lines * BLOCK, h.codes)


@njit
def _transpose(source: Any, columns: Any, to: Any, dtype: Any) -> None:
    """Store the numbers [BLOCK, columns] at ``source`` as [columns, BLOCK]."""
    numbers, transposed = carray(pointer(source), (BLOCK, columns), dtype), carray(pointer(to), (columns, BLOCK), dtype)
    for column in range(columns):
        for row in range(BLOCK):
            transposed[column, row] = numbers[row, column]


@njit
def _order_lines(to: Any, size: Any, codes: Any) -> None:
    """Move inputs of even numbers to the lower half of each of ``size`` words, those of odd numbers to the upper."""
    words = carray(pointer(to), size, np.uint32)
    if codes == I8:
        for i in range(size):
            word = words[i]
            words[i] = word & 0xFF0000FF | (word & 0xFF00) << 8 | word >> 8 & 0xFF00
    else:
        for i in range(size):
            word = words[i]
            even, odd = word & 0x0F0F0F0F, word >> 4 & 0x0F0F0F0F
            even, odd = (even | even >> 4) & 0x00FF00FF, (odd | odd >> 4) & 0x00FF00FF
            words[i] = (even | even >> 8) & 0xFFFF | (odd | odd >> 8) << 16


@njit
def _has_nan(source: Any, size: Any) -> Any:
    """Return whether any of ``size`` bytes has all bits set, the sign aside."""
    found = np.uint64(0)
    for word in carray(pointer(source), size // 8, np.uint64):
        found |= (word & np.uint64(0x7F7F7F7F7F7F7F7F)) + np.uint64(0x0101010101010101)
    return found & np.uint64(0x8080808080808080) != 0
