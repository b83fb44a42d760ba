"""Products of many rows on CPUs with AMX: weights are decoded to bfloat16, some outputs at a time, for oneDNN."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from qnext_plugin.ops.cpu import kernels
from qnext_plugin.ops.cpu.jit import in_parallel, pointer, share, thread_num
from qnext_plugin.ops.cpu.packing import BLOCK, LINE, Form
from qnext_plugin.ops.cpu.panels import HEADER, TILE, chunk_of, coding, read_scales

MANY = 64  # the fewest rows for which this takes less time than a product in float32
SLICE = 1 << 22  # bytes of decoded weights, which a core's cache can hold


def available() -> bool:
    """Return whether weights can be decoded here; the first call compiles what does it."""
    return in_parallel(_region) is not None


def fill(
    out: Tensor,
    form: Form,
    x: Tensor,
    packed: Tensor,
    used: Sequence[int],
    counts: Sequence[int],
    rows: Tensor | None,
) -> None:
    """Compute those rows of ``out`` that are at least MANY for a matrix; arguments are those of ``quantized.products``.

    Inputs and weights are rounded to bfloat16, and so are the outputs.
    """
    matrices, x = packed.view(-1, *packed.shape[-2:]), x.to(torch.bfloat16)
    step = max(SLICE // (2 * BLOCK * form.k), 1)
    buffer = torch.empty(form.k * BLOCK * min(step, packed.shape[-2]), dtype=torch.bfloat16)
    parts = zip(used, np.cumsum(counts).tolist(), counts, strict=True)
    for which, end, count in parts:
        if count < MANY:
            continue
        inputs = x[end - count : end] if rows is None else x[rows[end - count : end]]
        for first in range(0, packed.shape[-2], step):
            blocks = matrices[which, first : first + step]
            weight = buffer[: form.k * BLOCK * len(blocks)].view(form.k, -1)
            _decode(form, blocks, weight)
            out[end - count : end, first * BLOCK : (first + len(blocks)) * BLOCK] = inputs @ weight


def _decode(form: Form, blocks: Tensor, weight: Tensor) -> None:
    """Store the transposed weights of packed ``blocks`` in ``weight`` [k, len(blocks) * BLOCK] bfloat16."""
    chunk = chunk_of(form)
    tables = 2 * BLOCK * (form.padded_k // chunk)
    per_thread = tables + TILE * BLOCK // 2
    scratch = torch.empty(torch.get_num_threads(), per_thread, dtype=torch.int32)
    sizes = (1, len(blocks), form.k, form.padded_k, form.groups, chunk, 0, 0)
    sections = (0, 0, 0, tables, 0, per_thread)
    addresses = (blocks.data_ptr(), 0, 0, weight.data_ptr(), scratch.data_ptr(), 0, 0)
    run = in_parallel(_region)
    assert run is not None
    run(np.array([*sizes, *coding(form), *sections, *addresses], np.int64))


def _region(data: Any) -> None:
    """Decode one thread's share of blocks, tile by tile."""
    h = carray(data, 1, HEADER)[0]
    scales = h.scratch + 4 * h.per_thread * thread_num()
    tile = scales + 4 * h.tile_at
    at_once, lines, words = max(TILE // h.chunk, 1), h.chunk // h.per_line, BLOCK // 4
    out = carray(pointer(h.out), (h.k, h.blocks, words), np.uint64)
    found = carray(pointer(tile), (TILE, words), np.uint64)
    first, last = share(h.blocks)
    for block in range(first, last):
        at = h.packed + h.block_bytes * block
        read_scales(h, at, scales)
        for c in range(0, h.padded_k // h.chunk, at_once):
            now = min(at_once, h.padded_k // h.chunk - c)
            _tile(h.codes, (at + h.codes_at + LINE * c * lines, scales + 8 * BLOCK * c, tile, now, lines))
            k = c * h.chunk
            for i in range(min(now * h.chunk, h.k - k)):
                for j in range(words):
                    out[k + i, block, j] = found[i, j]


_tile = kernels.choice(kernels.BFLOAT16_TILES)
