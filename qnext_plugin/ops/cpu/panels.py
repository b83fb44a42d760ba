"""What compiled regions over packed weights share: their header, and inputs and scales in a thread's scratch.

Integer and FP4 codes are multiplied by inputs that are rounded to int16, in parts of at most CHUNK inputs with a factor
for each: an error of at most 2**-16 of a part's largest input, which is less than that of bfloat16.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from qnext_plugin.ops.cpu import kernels
from qnext_plugin.ops.cpu.decoders import E2M1_OFFSET
from qnext_plugin.ops.cpu.jit import as_float, pointer, thread_num
from qnext_plugin.ops.cpu.packing import CODES, MIDDLE, Form

CHUNK = 128  # the most inputs that are rounded together, and summed in int32
TILE = 256  # the inputs of a tile
SMALLEST = 27 << 23  # the bits of 2**-100: smaller inputs are taken for 0
INFINITY = 255 << 23
E4M3 = CODES.index("e4m3")

FIELDS = (
    *("matrices", "blocks", "k", "padded_k", "groups", "chunk", "num_rows", "most"),
    *("codes", "scales", "has_zeros", "per_line", "factor", "zero", "scales_at", "zeros_at", "codes_at", "block_bytes"),
    *("row_at", "factors_at", "tables_at", "tile_at", "sums_at", "per_thread"),
    *("packed", "x", "rows", "out", "scratch", "x_bytes", "out_bytes", "experts"),
)
HEADER = np.dtype([(field, np.int64) for field in FIELDS])


@cache
def coding(form: Form) -> tuple[int, ...]:
    """Return the fields from ``codes`` to ``block_bytes``."""
    return (form.codes, form.scales, form.has_zeros, form.per_line, *_code(form), *form.offsets)


@cache
def _code(form: Form) -> tuple[int, int]:
    """Return the bits of the value of a code that ``kernels`` decodes to 1, and of the one that it decodes 0 to."""
    numbers = {"u4": (1, MIDDLE), "e2m1": (0.5, E2M1_OFFSET), "i8": (1, 0), "e4m3": (256, 0)}[CODES[form.codes]]
    factor, zero = np.array(numbers, np.float32).view(np.int32).tolist()
    return factor, zero


@cache
def chunk_of(form: Form) -> int:
    """Return how many inputs, whole lines, make a part of a group."""
    size = form.group if form.groups > 1 else form.padded_k
    return max(d for d in range(form.per_line, CHUNK + 1, form.per_line) if size % d == 0)


@njit
def _read_row(h: Any, r: Any) -> Any:
    """Copy a row of inputs as float32 and return it; zeros fill the last line."""
    own = h.scratch + 4 * h.per_thread * thread_num()
    bits = carray(pointer(own + 4 * h.row_at), h.padded_k, np.uint32)
    source = r
    if h.rows:
        source = carray(pointer(h.rows), h.num_rows, np.int64)[r]
    if h.x_bytes == 2:
        x16 = carray(pointer(h.x + 2 * h.k * source), h.k, np.uint16)
        for j in range(h.k):
            bits[j] = np.uint32(x16[j]) << np.uint32(16)
    else:
        x32 = carray(pointer(h.x + 4 * h.k * source), h.k, np.uint32)
        for j in range(h.k):
            bits[j] = x32[j]
    for j in range(h.k, h.padded_k):
        bits[j] = 0
    return bits


@njit
def read_floats(h: Any, begin: Any, end: Any, to: Any) -> None:
    """Store rows of inputs as [k, rows]."""
    panel = carray(pointer(to), (h.padded_k, end - begin), np.uint32)
    for r in range(begin, end):
        bits = _read_row(h, r)
        for j in range(h.padded_k):
            panel[j, r - begin] = bits[j]


@njit
def read_inputs(h: Any, begin: Any, end: Any, to: Any, factors_at: Any) -> None:
    """Store rows of inputs as ``kernels.product`` takes them."""
    if h.codes == E4M3:
        read_floats(h, begin, end, to)
        return
    own = h.scratch + 4 * h.per_thread * thread_num()
    rounded_at = own + 4 * (h.row_at + h.padded_k)
    rounded = carray(pointer(rounded_at), h.padded_k, np.int16)
    pairs = carray(pointer(rounded_at), h.padded_k // 2, np.uint32)
    panel = carray(pointer(to), (h.padded_k // 2, end - begin), np.uint32)
    factors = carray(pointer(factors_at), (h.padded_k // h.chunk, 2, end - begin), np.float32)
    for r in range(begin, end):
        bits = _read_row(h, r)
        x = carray(pointer(own + 4 * h.row_at), h.padded_k, np.float32)
        for c in range(h.padded_k // h.chunk):
            start = c * h.chunk
            factor, total = _round(bits[start:], x[start:], rounded[start:], h.chunk)
            factors[c, 0, r - begin] = factor
            factors[c, 1, r - begin] = -total
        for j in range(h.padded_k // 2):
            panel[j, r - begin] = pairs[j]


@njit
def _largest(bits: Any, size: Any) -> Any:
    """Return the bits of the largest magnitude; those of infinity and NaN are larger than any number's."""
    found = np.uint32(0)
    for j in range(size):
        magnitude = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
        if magnitude > found:
            found = magnitude
    return found


@njit
def _round(bits: Any, x: Any, to: Any, size: Any) -> Any:
    """Round ``size`` inputs to int16; returns the factor that undoes it, and the sum of the integers."""
    largest_bits = _largest(bits, size)
    if largest_bits >= INFINITY:
        to[:size] = 0
        return np.float32(np.nan), np.float32(0)
    largest, inverse, total = as_float(largest_bits), np.float32(0), np.int32(0)
    if largest_bits > SMALLEST:
        inverse = np.float32(32767) / largest
    for j in range(size):
        number = np.int32(np.rint(x[j] * inverse))
        to[j] = number
        total = np.int32(total + number)
    return largest / np.float32(32767), np.float32(total)


@njit
def read_scales(h: Any, at: Any, to: Any) -> None:
    """Store a block's scales and zero points as ``kernels.product`` takes them."""
    zeros = at + h.zeros_at if h.has_zeros else 0
    repeats = h.padded_k // h.chunk // h.groups
    _table(h.scales, (at + h.scales_at, zeros, at, to, h.groups, repeats, h.factor, h.zero))


_table = kernels.choice(kernels.TABLES)
