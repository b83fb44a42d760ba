"""The delta rule of a decode step on CPU, compiled by Numba, on which SGLang depends.

It reads and writes each state once, where torch takes nine passes over what no cache holds. Numba's own threads would
compete with torch's for the cores, so what is compiled runs as a parallel region of the OpenMP runtime that torch has
loaded.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from qnext_plugin.ops.gated_delta_rule import l2norm

_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())


@cache
def compiled() -> Callable[[np.ndarray], None] | None:
    """``_region`` for all of torch's threads, if torch brings GNU's OpenMP runtime, as its packages on PyPI do.

    It is compiled once on a machine: Numba keeps the result next to this file, or in the user's cache.
    """
    file = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if file is None:
        return None
    binding.load_library_permanently(str(file))  # where compiled code finds its functions
    library = ctypes.CDLL(str(file))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    region = cfunc(types.void(types.voidptr), cache=True)(_region)
    return lambda data: library.GOMP_parallel(region.address, data.ctypes.data, torch.get_num_threads(), 0)


def serves(states: Tensor) -> bool:
    return states.dtype == torch.float32 and states.is_contiguous() and compiled() is not None


def decode(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """``ops.recurrent_gated_delta_rule`` from ``states[slots]``, which is written over; returns ``out`` [N, Hv, V].

    ``slots`` [N] are all different; ``serves(states)``, which are [slots, Hv, K, V].
    """
    scaled, decay = l2norm(q).float() * q.shape[-1] ** -0.5, g.float().exp()
    inputs = [x.contiguous() for x in (scaled, l2norm(k).float(), v.float(), decay, beta.float(), slots.long())]
    out = torch.empty(v.shape)
    sizes = (len(v), len(states), q.shape[1], *states.shape[1:])
    run = compiled()
    assert run is not None
    run(np.array([*sizes, *(x.data_ptr() for x in (*inputs, states, out))], np.int64))
    return out.to(v.dtype)


def _region(data: Any) -> None:
    """What each thread does: its share of the heads of all sequences."""
    a = carray(data, 14, np.int64)
    n, num_slots, groups, heads, rows, columns = a[0], a[1], a[2], a[3], a[4], a[5]
    q, k = carray(_at(a[6]), (n, groups, rows), np.float32), carray(_at(a[7]), (n, groups, rows), np.float32)
    v, out = carray(_at(a[8]), (n, heads, columns), np.float32), carray(_at(a[13]), (n, heads, columns), np.float32)
    decay, beta = carray(_at(a[9]), (n, heads), np.float32), carray(_at(a[10]), (n, heads), np.float32)
    slots = carray(_at(a[11]), (n,), np.int64)
    states = carray(_at(a[12]), (num_slots, heads, rows, columns), np.float32)
    jobs, thread, threads = n * heads, _thread_num(), _num_threads()
    for job in range(jobs * thread // threads, jobs * (thread + 1) // threads):
        i, head = job // heads, job % heads
        group, state = head * groups // heads, states[slots[i], head]
        _head(q[i, group], k[i, group], v[i, head], decay[i, head], beta[i, head], state, out[i, head])


@njit(fastmath={"reassoc", "contract", "nsz"})  # type: ignore[misc]  # sums in any order, but NaN stays NaN
def _head(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any, out: Any) -> None:
    """Both reads in one pass, then the write: S^T q after it is S^T q before it plus (q . k) times what is written."""
    read_q, read_k, q_dot_k = np.zeros(len(v), np.float32), np.zeros(len(v), np.float32), np.float32(0)
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


@intrinsic  # type: ignore[misc]
def _at(_: Any, address: Any) -> Any:
    """The pointer to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate
