"""The convolution of ``ops.causal_conv1d`` in bfloat16, compiled for CPUs, over rows of a cache that stay in place."""

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from qnext_plugin.ops.cpu.jit import as_float, exp, in_parallel, pointer, round_to, share


def available() -> bool:
    """Return whether the kernel can run here; the first call compiles it."""
    return in_parallel(_region) is not None


def convolve(windows: np.ndarray, weight: Tensor, targets: np.ndarray, sources: np.ndarray) -> Tensor:
    """Return ``silu(sum_w weight[:, w] * row[t, w])`` [T, C] in bfloat16, and copy rows of the cache afterwards.

    ``windows`` [T, W] are addresses of rows of C channels in bfloat16, ``weight`` [C, W] is float32. ``sources`` [M]
    are copied to ``targets`` [M], one after the other; both are addresses of such rows. Sums are in float32, in the
    same order for any T.
    """
    (num_tokens, width), num_channels = windows.shape, len(weight)
    taps, out = weight.mT.contiguous(), torch.empty(num_tokens, num_channels, dtype=torch.bfloat16)
    rows = [np.ascontiguousarray(addresses, np.int64) for addresses in (windows, targets, sources)]
    sizes = (num_tokens, width, num_channels, targets.size)
    run = in_parallel(_region)
    assert run is not None
    run(np.array([*sizes, *(part.ctypes.data for part in rows), taps.data_ptr(), out.data_ptr()], np.int64))
    return out


def _region(data: Any) -> None:
    """Compute one thread's share of the channels of all rows, then copy these."""
    a = carray(data, 9, np.int64)
    num_tokens, width, channels, moves = a[0], a[1], a[2], a[3]
    windows = carray(pointer(a[4]), (num_tokens, width), np.int64)
    targets, sources = carray(pointer(a[5]), moves, np.int64), carray(pointer(a[6]), moves, np.int64)
    begin, end = share(channels)
    size = end - begin
    sums: Any = np.empty(size, np.float32)
    bits = sums.view(np.uint32)
    for t in range(num_tokens):
        for c in range(size):
            sums[c] = 0
        for w in range(width):
            row = carray(pointer(windows[t, w] + 2 * begin), size, np.uint16)
            _add(sums, row, carray(pointer(a[7] + 4 * (w * channels + begin)), size, np.float32))
        _activate(sums)
        round_to(carray(pointer(a[8] + 2 * (t * channels + begin)), size, np.uint16), bits)
    for i in range(moves):
        source = carray(pointer(sources[i] + 2 * begin), size, np.uint16)
        target = carray(pointer(targets[i] + 2 * begin), size, np.uint16)
        for c in range(size):
            target[c] = source[c]


@njit(fastmath={"contract"})
def _add(sums: Any, row: Any, tap: Any) -> None:
    for c in range(len(sums)):
        sums[c] += as_float(np.uint32(row[c]) << np.uint32(16)) * tap[c]


@njit(error_model="numpy")  # a check for 0 would keep the loop from being vectorized
def _activate(sums: Any) -> None:
    for c in range(len(sums)):
        sums[c] = sums[c] / (np.float32(1) + exp(-sums[c]))
