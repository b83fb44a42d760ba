"""The compiled loops of products with packed weights: one thread's share of all products of a call.

For few rows codes are decoded in the registers that they are multiplied in, by inputs as ``panels.py`` rounds them. For
many rows a block is decoded to float32 once, in tiles that stay in a core's cache.
"""

from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from numba import carray, njit

from qnext_plugin.ops.cpu import kernels
from qnext_plugin.ops.cpu.jit import bounds, pointer, rounded, share, thread_num
from qnext_plugin.ops.cpu.packing import BLOCK, LINE, Form
from qnext_plugin.ops.cpu.panels import TILE, read_floats, read_inputs, read_scales

FEW = 12  # the most rows for which codes are decoded in registers
PARTS = 8  # parts of up to ROWS rows that stay in a core's cache while all weights are read
FEW_ROWS, ROWS, TOGETHER = kernels.FEW_ROWS, kernels.ROWS, kernels.TOGETHER
ZERO, ONE = np.int64(0), np.int64(1)
"""Numba would compile functions again for a literal argument."""

ONCE = njit(inline="always")
"""For functions with the loops in them, which LLVM would otherwise optimize again in each that calls them."""


@cache
def sections(form: Form, chunk: int) -> tuple[int, ...]:
    """Return where a thread's scratch has its parts, in numbers of 4 bytes, and how large it is. They are::

    inputs [PARTS, k, ROWS], one row of inputs [2, k], factors [chunks, 2, FEW], scales [TOGETHER, chunks, 2, BLOCK],
    a tile [TILE, BLOCK], sums [PARTS, ROWS, TOGETHER, BLOCK]
    """
    k, chunks = form.padded_k, form.padded_k // chunk
    sizes = (PARTS * ROWS * k, 2 * k, 2 * chunks * FEW, 2 * TOGETHER * chunks * BLOCK, TILE * BLOCK)
    return (*accumulate(sizes), sum(sizes) + PARTS * ROWS * TOGETHER * BLOCK)


@ONCE
def multiply(h: Any, used: Any, counts: Any) -> None:
    """Multiply the next ``counts[i]`` rows by matrix ``used[i]``; a job is a block and rows that are computed at once.

    ``h`` is a ``panels.HEADER``.
    """
    total, row = ZERO, ZERO
    for i in range(h.matrices):
        total += h.blocks * _jobs(counts[i], h.most) * _cost(counts[i])
    first, last = share(total)
    for i in range(h.matrices):
        which, count = used[i], counts[i]
        jobs, cost = h.blocks * _jobs(count, h.most), _cost(count)
        job, stop = max(-(-first // cost), 0), min(-(-last // cost), jobs)
        if job < stop:
            weights = h.packed + h.block_bytes * h.blocks * which
            if count <= FEW:
                following = h.packed + h.block_bytes * h.blocks * used[i + 1] if last > jobs * cost else weights
                _few(h, weights, row, count, job, stop, following)
            else:
                _many(h, weights, row, count, job, stop)
        row, first, last = row + count, first - jobs * cost, last - jobs * cost


@njit
def _parts(count: Any) -> Any:
    """Return into how many parts rows are divided, each computed at once."""
    size = FEW_ROWS if count <= FEW else ROWS
    return (count + size - 1) // size


@njit
def _jobs(count: Any, most: Any) -> Any:
    """Return how many jobs a block is; none where ``decoded`` takes the rows."""
    if count > most:
        return ZERO
    return min(count, 1) if count <= FEW else _parts(count)


@njit
def _cost(count: Any) -> Any:
    """Return what a job costs, in rows: decoding counts for two."""
    return (count if count <= FEW else count // _parts(count)) + 2


@ONCE
def _few(h: Any, weights: Any, row: Any, count: Any, job: Any, stop: Any, following: Any) -> None:
    """Multiply ``count`` rows from ``row`` on by one matrix; a job is a block. What is read next is ``following``."""
    own, parts, chunks = h.scratch + 4 * h.per_thread * thread_num(), _parts(count), h.padded_k // h.chunk
    inputs, factors = 4 * FEW_ROWS * h.padded_k, own + 4 * h.factors_at
    per_part = 8 * FEW_ROWS * chunks
    scales, sums_at = own + 4 * h.tables_at, own + 4 * h.sums_at
    for part in range(parts):
        begin, end = bounds(row, count, parts, part)
        read_inputs(h, begin, end, own + inputs * part, factors + per_part * part)
    lines, size = h.chunk // h.per_line, count * TOGETHER * BLOCK
    sums = carray(pointer(sums_at), size, np.float32)
    while job < stop:
        together = 4 if count == 1 else kernels.TOGETHER_FOR_ROWS
        together = together if job + together <= stop else 1
        at = weights + h.block_bytes * job
        then = at + h.block_bytes * together if job + together < stop else following
        ahead = then - at - h.codes_at  # scales are before the codes, and are read first
        for b in range(together):
            read_scales(h, at + h.block_bytes * b, scales + 8 * BLOCK * chunks * b)
        for j in range(size):
            sums[j] = 0
        for part in range(parts):
            begin, end = bounds(row, count, parts, part)
            kernel = (h.codes * FEW_ROWS + end - begin - 1) * 2 + (together > 1)
            x, out = own + inputs * part, sums_at + 4 * TOGETHER * BLOCK * (begin - row)
            codes = at + h.codes_at
            _product(kernel, (codes, h.block_bytes, ahead, scales, x, factors + per_part * part, out, chunks, lines))
        _write(h, row, row + count, job, together, sums_at)
        job += together


@ONCE
def _many(h: Any, weights: Any, row: Any, count: Any, job: Any, stop: Any) -> None:
    """Do the same with blocks that are decoded for up to PARTS parts of the rows; a job is a block and a part."""
    own, parts, chunks = h.scratch + 4 * h.per_thread * thread_num(), _parts(count), h.padded_k // h.chunk
    inputs, per_part = 4 * ROWS * h.padded_k, 4 * ROWS * TOGETHER * BLOCK
    scales, tile, sums_at = own + 4 * h.tables_at, own + 4 * h.tile_at, own + 4 * h.sums_at
    at_once, filled = max(TILE // h.chunk, 1), -1
    while job < stop:
        group = job // (h.blocks * PARTS)
        size = min(PARTS, parts - group * PARTS)
        within = job - group * h.blocks * PARTS
        block, part = within // size, within % size
        end_part = min(size, part + stop - job)
        if group != filled:
            filled = group
            for i in range(size):
                begin, end = bounds(row, count, parts, group * PARTS + i)
                read_floats(h, begin, end, own + inputs * i)
        at = weights + h.block_bytes * block
        read_scales(h, at, scales)
        sums = carray(pointer(sums_at + per_part * part), (end_part - part) * ROWS * TOGETHER * BLOCK, np.float32)
        for j in range((end_part - part) * ROWS * TOGETHER * BLOCK):
            sums[j] = 0
        c = 0
        while c < chunks:
            now = min(at_once, chunks - c)
            lines, k = h.chunk // h.per_line, c * h.chunk
            _tile(h.codes, (at + h.codes_at + LINE * c * lines, scales + 8 * BLOCK * c, tile, now, lines))
            for i in range(part, end_part):
                begin, end = bounds(row, count, parts, group * PARTS + i)
                x = own + inputs * i + 4 * (end - begin) * k
                kernel, out = kernels.FLOATS_AT + end - begin, sums_at + per_part * i
                _product(kernel, (tile, 0, 0, 0, x, 0, out, 1, now * h.chunk))
            c += now
        for i in range(part, end_part):
            begin, end = bounds(row, count, parts, group * PARTS + i)
            _write(h, begin, end, block, ONE, sums_at + per_part * i)
        job += end_part - part


@njit
def _write(h: Any, begin: Any, end: Any, block: Any, together: Any, sums_at: Any) -> None:
    n = h.blocks * BLOCK
    sums = carray(pointer(sums_at), (end - begin, TOGETHER, BLOCK), np.uint32)
    out16, out32 = (
        carray(pointer(h.out), (h.num_rows, n), np.uint16),
        carray(pointer(h.out), (h.num_rows, n), np.uint32),
    )
    for r in range(begin, end):
        for b in range(together):
            for j in range(BLOCK):
                if h.out_bytes == 2:
                    out16[r, (block + b) * BLOCK + j] = rounded(sums[r - begin, b, j])
                else:
                    out32[r, (block + b) * BLOCK + j] = sums[r - begin, b, j]


_product, _tile = (kernels.choice(functions) for functions in (kernels.PRODUCTS, kernels.TILES))
