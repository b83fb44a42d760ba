"""Routed experts with packed weights, compiled: what sorts the tokens, both products, and what is between them."""

from typing import Any

import numpy as np
from numba import carray, njit

from qnext_plugin.ops.cpu.jit import as_float, barrier, exp, pointer, round_to, share, thread_num
from qnext_plugin.ops.cpu.multiply import multiply
from qnext_plugin.ops.cpu.packing import BLOCK
from qnext_plugin.ops.cpu.panels import HEADER

FIELDS = ("tokens", "top_k", "experts", "ids", "weights", "gate_up", "hidden", "down", "out", "lists", "second")
TASK = np.dtype([(field, np.int64) for field in FIELDS])
"""Sizes, then addresses. ``lists`` are the used experts, their numbers of rows and where each expert's rows begin
[experts], then of each row its token and its place in ``ids``, and of each place its row [pairs]; ``second`` is the
``HEADER`` of the second product."""


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
            hidden[row, j] = gate / (np.float32(1) + exp(-gate)) * gate_up[row, inner + j] * weight


@njit
def _combine(task: Any, first: Any, second: Any) -> None:
    """Add a token's rows and round once."""
    width, rows = first.k, _by_row(task)[2]
    begin, end = share(width)
    own = first.scratch + 4 * (first.per_thread * thread_num() + first.row_at)
    sums, bits = carray(pointer(own), end - begin, np.float32), carray(pointer(own), end - begin, np.uint32)
    for token in range(task.tokens):
        sums[:] = 0
        for place in range(token * task.top_k, (token + 1) * task.top_k):
            if rows[place] >= 0:
                at = task.down + 2 * (rows[place] * second.blocks * BLOCK + begin)
                row = carray(pointer(at), end - begin, np.uint16)
                for j in range(end - begin):
                    sums[j] += as_float(np.uint32(row[j]) << np.uint32(16))
        at = task.out + first.x_bytes * (token * width + begin)
        if first.x_bytes == 2:
            round_to(carray(pointer(at), end - begin, np.uint16), bits)
        else:
            carray(pointer(at), end - begin, np.uint32)[:] = bits
