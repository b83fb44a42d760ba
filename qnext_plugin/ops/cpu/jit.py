"""Parallel loops on CPUs, compiled by Numba; both engines depend on Numba.

Numba's own threads would compete with torch's for the cores, so the compiled code runs as a parallel region of the
OpenMP runtime that torch has loaded.
"""

import ctypes
import fcntl
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

logger = logging.getLogger(__name__)
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)

_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())


@cache
def in_parallel(region: Callable[[Any], None]) -> Callable[[np.ndarray], None] | None:
    """Compile ``region`` and return a function that runs it on an array in each of torch's threads.

    ``region`` gets the address of the array. Returns None if torch includes no GNU OpenMP runtime; its packages on
    PyPI do. A machine compiles a region only once, however many processes start: Numba keeps the result next to the
    code or in the user's cache.
    """
    library = openmp()
    if library is None:
        return None
    compiled, folder = _Logged(region, ((types.voidptr,), types.void), {}, {}), _cache_folder(region)
    if folder is None:
        compiled.compile()
    else:
        compiled.enable_caching()
        with open(folder / "qnext-plugin.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            compiled.compile()
    return lambda data: library.GOMP_parallel(compiled.address, data.ctypes.data, torch.get_num_threads(), 0)


@cache
def openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP runtime that torch includes, or None."""
    file = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if file is None:
        return None
    binding.load_library_permanently(str(file))  # so that compiled code finds the library's functions
    library = ctypes.CDLL(str(file))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


class _Logged(CFunc):
    """What Numba's decorator ``cfunc`` makes, with lines in the log about what is not read from a cache."""

    def _compile_uncached(self) -> Any:
        name, start = self._pyfunc.__module__, monotonic()
        logger.info("compiling %s for this CPU, which takes some seconds", name)
        compiled = super()._compile_uncached()
        logger.info("compiled %s in %.1f s", name, monotonic() - start)
        return compiled


def _cache_folder(region: Callable[[Any], None]) -> Path | None:
    """Return where Numba keeps a compiled ``region``, or None where it can write to no folder."""
    try:
        return Path(FunctionCache(region).cache_path)
    except RuntimeError:
        _warn_of_no_cache()
        return None


@cache
def _warn_of_no_cache() -> None:
    logger.warning(
        "loops compiled for this CPU cannot be kept, so each start compiles them again: no cache folder is writable; "
        "let NUMBA_CACHE_DIR name one that is"
    )


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


@njit
def round_to(to: Any, bits: Any) -> None:
    for j in range(len(to)):
        to[j] = rounded(bits[j])


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


def _as_float(_: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


as_float: Any = intrinsic(_as_float)
"""This function returns the float32 that has the bits of a uint32."""


@njit(fastmath={"contract"})
def exp(x: Any) -> Any:
    """Return ``e ** x`` within a few units in the last place, infinity for ``x`` above 88, any number for NaN."""
    x = min(max(x, np.float32(-87)), np.float32(89))
    n = np.rint(x * LOG2E)
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = np.float32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(factor)
    return series * as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
