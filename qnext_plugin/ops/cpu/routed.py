"""Routed experts with packed weights, compiled: what is before, between and after the two products."""

from typing import Any

import numpy as np
from numba import carray, njit

from qnext_plugin.ops.cpu.jit import as_float, barrier, exp, pointer, round_to, share, thread_num
from qnext_plugin.ops.cpu.packing import BLOCK
from qnext_plugin.ops.cpu.panels import HEADER

FIELDS = ("tokens", "top_k", "experts", "ids", "weights", "gate_up", "hidden", "down", "out", "lists", "second")
TASK = np.dtype([(field, np.int64) for field in FIELDS])
"""Sizes, then addresses. ``lists`` are the used experts, their numbers of rows and where each expert's rows begin
[experts], then of each row its token and its place in ``ids``, and of each place its row [pairs]; ``second`` is the
``HEADER`` of the second product."""


@njit
def second(first: Any) -> Any:
    """Return a pointer to the ``HEADER`` of the second product; ``first`` is that of the first."""
    return pointer(_task(first).second)


@njit
def sort(first: Any) -> Any:
    """Order the places by expert; an id of -1 has no row. Returns ``lists``, and how far their parts are apart."""
    task, then = _task(first), carray(second(first), 1, HEADER)[0]
    used = carray(pointer(task.lists), 3 * task.experts, np.int64)
    if thread_num() == 0:
        counts, begins = used[task.experts :], used[2 * task.experts :]
        ids = carray(pointer(task.ids), task.tokens * task.top_k, np.int64)
        tokens, places, rows = _by_row(task)
        for expert in range(task.experts):
            begins[expert] = 0
        for place in range(len(ids)):
            if ids[place] >= 0:
                begins[ids[place]] += 1
        matrices, row = 0, 0
        for expert in range(task.experts):
            count, begins[expert] = begins[expert], row
            if count:
                used[matrices], counts[matrices] = expert, count
                matrices, row = matrices + 1, row + count
        for place in range(len(ids)):
            rows[place] = -1
            if ids[place] >= 0:
                r = begins[ids[place]]
                tokens[r], places[r], rows[place] = place // task.top_k, place, r
                begins[ids[place]] += 1
        first.matrices = then.matrices = matrices
        first.num_rows = then.num_rows = row
    barrier()
    return used, task.experts


@njit
def _task(first: Any) -> Any:
    return carray(pointer(first.experts), 1, TASK)[0]


@njit
def _by_row(task: Any) -> Any:
    """Return each row's token and place, and each place's row."""
    pairs = task.tokens * task.top_k
    at = task.lists + 24 * task.experts
    tokens, places = carray(pointer(at), pairs, np.int64), carray(pointer(at + 8 * pairs), pairs, np.int64)
    return tokens, places, carray(pointer(at + 16 * pairs), pairs, np.int64)


@njit(error_model="numpy")  # a check for 0 would keep the loop from being vectorized
def activate(first: Any) -> None:
    """Store ``silu(gate) * up`` times the routing weight: the rest is linear, and so the product is rounded once."""
    task = _task(first)
    pairs, inner = task.tokens * task.top_k, carray(second(first), 1, HEADER)[0].k
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
def combine(first: Any) -> None:
    """Add a token's rows and round once."""
    task, blocks = _task(first), carray(second(first), 1, HEADER)[0].blocks
    width, rows = first.k, _by_row(task)[2]
    begin, end = share(width)
    own = first.scratch + 4 * (first.per_thread * thread_num() + first.row_at)
    sums, bits = carray(pointer(own), end - begin, np.float32), carray(pointer(own), end - begin, np.uint32)
    for token in range(task.tokens):
        for j in range(end - begin):
            sums[j] = 0
        for place in range(token * task.top_k, (token + 1) * task.top_k):
            if rows[place] >= 0:
                at = task.down + 2 * (rows[place] * blocks * BLOCK + begin)
                row = carray(pointer(at), end - begin, np.uint16)
                for j in range(end - begin):
                    sums[j] += as_float(np.uint32(row[j]) << np.uint32(16))
        at = task.out + first.x_bytes * (token * width + begin)
        if first.x_bytes == 2:
            round_to(carray(pointer(at), end - begin, np.uint16), bits)
        else:
            out32 = carray(pointer(at), end - begin, np.uint32)
            for j in range(end - begin):
                out32[j] = bits[j]
