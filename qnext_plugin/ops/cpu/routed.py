"""Routed experts with packed weights, compiled: what sorts the tokens, both products, and what is between them."""

from typing import Any

import numpy as np
from numba import carray, njit

from qnext_plugin.ops.cpu.jit import as_float, barrier, pointer, rounded, share, thread_num
from qnext_plugin.ops.cpu.multiply import multiply
from qnext_plugin.ops.cpu.packing import BLOCK
from qnext_plugin.ops.cpu.panels import HEADER

FIELDS = ("tokens", "top_k", "experts", "ids", "weights", "gate_up", "hidden", "down", "out", "lists", "second")
TASK = np.dtype([(field, np.int64) for field in FIELDS])
"""Sizes, then addresses. ``lists`` are the used experts, their numbers of rows and where each expert's rows begin
[experts], then of each row its token and its place in ``ids``, and of each place its row [pairs]; ``second`` is the
``HEADER`` of the second product."""
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


@njit
def compute(first: Any) -> None:
    """Compute one thread's share of ``experts.routed_experts``; ``first`` is the ``HEADER`` of the first product."""
    task = carray(pointer(first.experts), 1, TASK)[0]
    second = carray(pointer(task.second), 1, HEADER)[0]
    lists = carray(pointer(task.lists), (3, task.experts), np.int64)
    if thread_num() == 0:
        _sort(task, first, second, lists)
    barrier()
    multiply(first, lists[0], lists[1])
    barrier()
    _activate(task, first, second)
    barrier()
    multiply(second, lists[0], lists[1])
    barrier()
    _combine(task, first, second)


@njit
def _by_row(task: Any) -> Any:
    pairs = task.tokens * task.top_k
    return carray(pointer(task.lists + 24 * task.experts), (3, pairs), np.int64)


@njit
def _sort(task: Any, first: Any, second: Any, lists: Any) -> None:
    """Order the places by expert; an id of -1 has no row."""
    pairs = task.tokens * task.top_k
    ids, (tokens, places, rows) = carray(pointer(task.ids), pairs, np.int64), _by_row(task)
    used, counts, begins = lists[0], lists[1], lists[2]
    begins[:] = 0
    for place in range(pairs):
        if ids[place] >= 0:
            begins[ids[place]] += 1
    matrices, row = 0, 0
    for expert in range(task.experts):
        count, begins[expert] = begins[expert], row
        if count:
            used[matrices], counts[matrices] = expert, count
            matrices, row = matrices + 1, row + count
    for place in range(pairs):
        rows[place] = -1
        if ids[place] >= 0:
            r = begins[ids[place]]
            tokens[r], places[r], rows[place] = place // task.top_k, place, r
            begins[ids[place]] += 1
    first.matrices = second.matrices = matrices
    first.num_rows = second.num_rows = row


@njit(error_model="numpy")  # a check for 0 would keep the loop from being vectorized
def _activate(task: Any, first: Any, second: Any) -> None:
    """Store ``silu(gate) * up`` times the routing weight: the rest is linear, and so the product is rounded once."""
    pairs, inner = task.tokens * task.top_k, second.k
    weights, places = carray(pointer(task.weights), pairs, np.float32), _by_row(task)[1]
    gate_up = carray(pointer(task.gate_up), (pairs, first.blocks * BLOCK), np.float32)
    hidden = carray(pointer(task.hidden), (pairs, inner), np.float32)
    begin, end = share(first.num_rows)
    for row in range(begin, end):
        weight = weights[places[row]]
        for j in range(inner):
            gate = gate_up[row, j]
            hidden[row, j] = gate / (np.float32(1) + _exp(-gate)) * gate_up[row, inner + j] * weight


@njit
def _combine(task: Any, first: Any, second: Any) -> None:
    """Add a token's rows and round once."""
    pairs, width, rows = task.tokens * task.top_k, first.k, _by_row(task)[2]
    own = first.scratch + 4 * (first.per_thread * thread_num() + first.row_at)
    sums, bits = carray(pointer(own), width, np.float32), carray(pointer(own), width, np.uint32)
    down = carray(pointer(task.down), (pairs, second.blocks * BLOCK), np.uint16)
    out16 = carray(pointer(task.out), (task.tokens, width), np.uint16)
    out32 = carray(pointer(task.out), (task.tokens, width), np.uint32)
    begin, end = share(width)
    for token in range(task.tokens):
        sums[begin:end] = 0
        for place in range(token * task.top_k, (token + 1) * task.top_k):
            if rows[place] >= 0:
                for j in range(begin, end):
                    sums[j] += as_float(np.uint32(down[rows[place], j]) << np.uint32(16))
        for j in range(begin, end):
            if first.x_bytes == 2:
                out16[token, j] = rounded(bits[j])
            else:
                out32[token, j] = bits[j]


@njit(fastmath={"contract"})
def _exp(x: Any) -> Any:
    """Return ``e ** x`` within a few units in the last place, infinity for ``x`` above 88, NaN for NaN."""
    x = min(max(x, np.float32(-87)), np.float32(89))
    n = np.rint(x * LOG2E)
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = np.float32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(factor)
    return series * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
