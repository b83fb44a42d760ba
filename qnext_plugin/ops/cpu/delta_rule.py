"""The delta rule of a decode step, compiled for CPUs.

It reads and writes each state once. Torch makes nine passes over states that do not fit in a cache.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from qnext_plugin.ops.cpu.jit import in_parallel, pointer, share
from qnext_plugin.ops.gated_delta_rule import l2norm


def available() -> bool:
    """Return whether the kernel can run here; the first call compiles it."""
    return in_parallel(_region) is not None


def serves(states: Tensor) -> bool:
    return states.dtype == torch.float32 and states.is_contiguous() and available()


def decode(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """Apply ``ops.recurrent_gated_delta_rule`` to ``states[slots]`` in place; returns ``out`` [N, Hv, V].

    ``states`` is [slots, Hv, K, V], and ``serves(states)`` holds. ``slots`` [N] are all different.
    """
    scaled, decay = l2norm(q).float() * q.shape[-1] ** -0.5, g.float().exp()
    inputs = [x.contiguous() for x in (scaled, l2norm(k).float(), v.float(), decay, beta.float(), slots.long())]
    out = torch.empty(v.shape)
    sizes = (len(v), len(states), q.shape[1], *states.shape[1:])
    run = in_parallel(_region)
    assert run is not None
    run(np.array([*sizes, *(x.data_ptr() for x in (*inputs, states, out))], np.int64))
    return out.to(v.dtype)


def _region(data: Any) -> None:
    """Compute one thread's share of the heads of all sequences."""
    a = carray(data, 14, np.int64)
    n, num_slots, groups, heads, rows, columns = a[0], a[1], a[2], a[3], a[4], a[5]
    q, k = carray(pointer(a[6]), (n, groups, rows), np.float32), carray(pointer(a[7]), (n, groups, rows), np.float32)
    v, out = (
        carray(pointer(a[8]), (n, heads, columns), np.float32),
        carray(pointer(a[13]), (n, heads, columns), np.float32),
    )
    decay, beta = carray(pointer(a[9]), (n, heads), np.float32), carray(pointer(a[10]), (n, heads), np.float32)
    slots = carray(pointer(a[11]), (n,), np.int64)
    states = carray(pointer(a[12]), (num_slots, heads, rows, columns), np.float32)
    first, last = share(n * heads)
    for job in range(first, last):
        i, head = job // heads, job % heads
        group, state = head * groups // heads, states[slots[i], head]
        _head(q[i, group], k[i, group], v[i, head], decay[i, head], beta[i, head], state, out[i, head])


@njit(fastmath={"reassoc", "contract", "nsz"})  # allows sums in any order; NaN stays NaN
def _head(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, out: Any) -> None:
    """Read the state for q and k in one pass, then write it.

    S^T q after the write is S^T q before it plus (q . k) times the written value.
    """
    read_q: Any = np.zeros(len(v), np.float32)
    read_k: Any = np.zeros(len(v), np.float32)
    q_dot_k = np.float32(0)
    for row in range(len(k)):
        q_dot_k += q[row] * k[row]
        s = state[row]
        for column in range(len(v)):
            read_q[column] += q[row] * s[column]
            read_k[column] += k[row] * s[column]
    delta = beta * (v - decay * read_k)
    out[:] = decay * read_q + q_dot_k * delta
    for row in range(len(k)):
        s = state[row]
        for column in range(len(v)):
            s[column] = decay * s[column] + k[row] * delta[column]
