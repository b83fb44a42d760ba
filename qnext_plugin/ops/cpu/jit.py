"""Parallel loops on CPUs, compiled by Numba; both engines depend on Numba.

Numba's own threads would compete with torch's for the cores, so the compiled code runs as a parallel region of the
OpenMP runtime that torch has loaded.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())


@cache
def in_parallel(region: Callable[[Any], None]) -> Callable[[np.ndarray], None] | None:
    """Compile ``region`` and return a function that runs it on an array in each of torch's threads.

    ``region`` gets the address of the array. Returns None if torch includes no GNU OpenMP runtime; its packages on
    PyPI do. A machine compiles a region only once: Numba keeps the result next to the code or in the user's cache.
    """
    file = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if file is None:
        return None
    binding.load_library_permanently(str(file))  # so that compiled code finds the library's functions
    library = ctypes.CDLL(str(file))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    signature = types.void(types.voidptr)
    try:
        compiled = cfunc(signature, cache=True)(region)
    except RuntimeError:  # neither directory is writable
        compiled = cfunc(signature)(region)
    return lambda data: library.GOMP_parallel(compiled.address, data.ctypes.data, torch.get_num_threads(), 0)


@njit
def share(jobs: Any) -> Any:
    """Return the first of this thread's ``jobs`` and the first of the next thread's."""
    thread, threads = thread_num(), _num_threads()
    return jobs * thread // threads, jobs * (thread + 1) // threads


@njit
def bounds(row: Any, count: Any, parts: Any, part: Any) -> Any:
    """Return the first row of a part of ``count`` rows from ``row`` on, and the first of the next part."""
    return row + count * part // parts, row + count * (part + 1) // parts


@njit
def rounded(bits: Any) -> Any:
    """Round the bits of a float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate
