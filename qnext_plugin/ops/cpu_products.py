"""Products with bfloat16 weights on CPUs with AVX2 and no instructions for bfloat16, compiled.

There torch multiplies bfloat16 ten times as slowly as float32. Here weights stay bfloat16 in memory and become float32
in registers, which costs a shift or a mask, so that few rows are computed at the rate of memory and many at that of
float32.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from qnext_plugin.ops.cpu_jit import in_parallel, pointer, share, thread_num

BLOCK = 16  # outputs at once
ROWS = 6  # at once: their sums of a block fill 12 of the 16 registers, its weights and the input the others
PARTS = 8  # of up to ROWS each are kept in a core's cache while all weights pass by
LINE = 4 * BLOCK  # bytes of a block's weights for two inputs


@cache
def available() -> bool:
    """Compiles it, the first time."""
    needed = torch.cpu._is_avx2_supported() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return needed and in_parallel(_region) is not None


def pack(weights: Tensor) -> Tensor:
    """[..., n, k] bfloat16, ``k`` even, as ``products`` takes them: in blocks of outputs, each by pairs of inputs.

    Returns [..., n rounded up to BLOCK, k].
    """
    *_, n, k = weights.shape
    padded = F.pad(weights, (0, 0, 0, -n % BLOCK))
    return padded.unflatten(-2, (-1, BLOCK)).unflatten(-1, (k // 2, 2)).transpose(-3, -2).reshape(padded.shape)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The [..., n, k] that ``pack`` was given."""
    *_, padded, k = packed.shape
    blocks = packed.unflatten(-2, (padded // BLOCK, BLOCK)).flatten(-2)
    return blocks.unflatten(-1, (k // 2, BLOCK, 2)).transpose(-3, -2).reshape(packed.shape)[..., :n, :]


def products(
    x: Tensor,
    packed: Tensor,
    used: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``counts[i]`` of the ``rows`` of ``x`` after one another by matrix ``used[i]``; by default all by the first.

    ``x`` [T, k] is bfloat16 or float32; ``packed`` [matrices, padded n, k] or [padded n, k]; ``rows`` [R] int64, by
    default each once. Returns [R, padded n] in ``dtype``, bfloat16 or float32; sums are float32.
    """
    assert packed.is_contiguous() and x.shape[-1] == packed.shape[-1]
    x = x.contiguous()
    n, k = packed.shape[-2:]
    num_rows = len(x) if rows is None else len(rows)
    out = torch.empty(num_rows, n, dtype=dtype)
    panels = torch.empty(torch.get_num_threads(), PARTS * ROWS * (k + BLOCK), dtype=torch.int32)
    rows = torch.arange(num_rows) if rows is None else rows.contiguous()
    matrices = np.array([used, (num_rows,) if counts is None else counts], np.int64)
    matrices[0] = packed.data_ptr() + 2 * n * k * matrices[0]
    sizes = (matrices.shape[1], n, k, len(x), num_rows, x.element_size(), out.element_size())
    run = in_parallel(_region)
    assert run is not None
    run(np.array([*sizes, *(t.data_ptr() for t in (x, rows, out, panels)), matrices.ctypes.data], np.int64))
    return out


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """``x`` [T, k] by one matrix of ``n`` outputs, rounded once; returns [T, n] bfloat16."""
    if bias is None:
        return products(x, packed)[:, :n]
    return (products(x, packed, dtype=torch.float32)[:, :n] + bias).to(torch.bfloat16)


def _region(data: Any) -> None:
    """What each thread does: its share of all products of a block and at most ``ROWS`` rows."""
    a = carray(data, 12, np.int64)
    n, k, num_rows, x_bytes, out_bytes = a[1], a[2], a[4], a[5], a[6]
    x16, x32 = carray(pointer(a[7]), (a[3], k), np.uint16), carray(pointer(a[7]), (a[3], k), np.uint32)
    rows = carray(pointer(a[8]), (num_rows,), np.int64)
    out16, out32 = carray(pointer(a[9]), (num_rows, n), np.uint16), carray(pointer(a[9]), (num_rows, n), np.uint32)
    own = a[10] + 4 * PARTS * ROWS * (k + BLOCK) * thread_num()
    panels = carray(pointer(own), (PARTS, k, ROWS), np.uint32)
    sums_at = own + 4 * PARTS * ROWS * k
    sums = carray(pointer(sums_at), (ROWS, BLOCK), np.uint32)
    addresses, counts = carray(pointer(a[11]), (2, a[0]), np.int64)
    blocks = n // BLOCK
    first, last = share(blocks * ((counts + ROWS - 1) // ROWS).sum())
    row = 0
    for matrix, count in zip(addresses, counts):  # noqa: B905
        parts = (count + ROWS - 1) // ROWS
        # Where a block is read more than once, the next one comes from further away meanwhile.
        ahead = LINE // 2 * k if parts > 1 else 32 * LINE
        filled = -1
        for job in range(max(first, 0), min(last, blocks * parts)):
            tile = job // (blocks * PARTS)
            size = min(PARTS, parts - tile * PARTS)
            within = job - tile * blocks * PARTS
            block, part = within // size, within % size
            if tile != filled:
                filled = tile
                for i in range(size):
                    begin, end = _bounds(row, count, parts, tile * PARTS + i)
                    for r in range(begin, end):
                        if x_bytes == 2:
                            for j in range(k):
                                panels[i, j, r - begin] = np.uint32(x16[rows[r], j]) << np.uint32(16)
                        else:
                            for j in range(k):
                                panels[i, j, r - begin] = x32[rows[r], j]
            begin, end = _bounds(row, count, parts, tile * PARTS + part)
            weights = matrix + LINE // 2 * k * block
            _block(end - begin, weights, own + 4 * ROWS * k * part, sums_at, k, ahead)
            for r in range(begin, end):
                for j in range(BLOCK):
                    bits = sums[r - begin, j]
                    if out_bytes == 2:
                        out16[r, block * BLOCK + j] = _rounded(bits)
                    else:
                        out32[r, block * BLOCK + j] = bits
        row, first, last = row + count, first - blocks * parts, last - blocks * parts


@njit
def _bounds(row: Any, count: Any, parts: Any, part: Any) -> Any:
    return row + count * part // parts, row + count * (part + 1) // parts


@njit
def _rounded(bits: Any) -> Any:
    """Of a float32 the bfloat16 next to it, of two the even one; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@njit
def _block(rows: Any, weights: Any, x: Any, out: Any, k: Any, ahead: Any) -> None:
    if rows == 1:
        _rows_1(weights, x, out, k, ahead)
    elif rows == 2:
        _rows_2(weights, x, out, k, ahead)
    elif rows == 3:
        _rows_3(weights, x, out, k, ahead)
    elif rows == 4:
        _rows_4(weights, x, out, k, ahead)
    elif rows == 5:
        _rows_5(weights, x, out, k, ahead)
    else:
        _rows_6(weights, x, out, k, ahead)


I32, I64, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
FLOAT, INTEGERS, FLOATS = ir.FloatType(), ir.VectorType(I32, 8), ir.VectorType(ir.FloatType(), 8)
VECTORS = range(BLOCK // 8)


def _of_rows(rows: int) -> Any:
    """``out[r, :16] = sum_i x[i, 0, r] weights[i, :16, 0] + x[i, 1, r] weights[i, :16, 1]`` for each of ``rows``.

    In the compiled loop ``weights``, ``x``, ``out`` are addresses; ``x`` has ROWS to an input and ``k`` inputs, ``out``
    BLOCK to a row. What is ``ahead`` of the weights, in bytes, is fetched.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, x, out, k, ahead = arguments
        declare = builder.module.declare_intrinsic
        multiply_add = declare("llvm.fma.v8f32", (), ir.FunctionType(FLOATS, [FLOATS] * 3))
        fetch = declare("llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]))

        def at(address: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(I64)
        i.add_incoming(I64(0), before)
        sums = [[builder.phi(FLOATS) for _ in VECTORS] for _ in range(rows)]
        for total in chain(*sums):
            total.add_incoming(FLOATS([0.0] * 8), before)
        here = builder.add(weights, builder.mul(i, I64(LINE)))
        builder.call(fetch, [at(here, ahead, ir.IntType(8)), I32(0), I32(2), I32(1)])
        pairs = [builder.load(at(here, I64(32 * j), INTEGERS), align=2) for j in VECTORS]
        low = [builder.bitcast(builder.shl(pair, INTEGERS([16] * 8)), FLOATS) for pair in pairs]
        high = [builder.bitcast(builder.and_(pair, INTEGERS([-(1 << 16)] * 8)), FLOATS) for pair in pairs]
        inputs = builder.add(x, builder.mul(i, I64(2 * 4 * ROWS)))
        results = sums
        for which, each in enumerate((low, high)):
            for r in range(rows):
                one = builder.load(at(inputs, I64(4 * (which * ROWS + r)), FLOAT), align=4)
                first = builder.insert_element(FLOATS(ir.Undefined), one, I32(0))
                spread = builder.shuffle_vector(first, FLOATS(ir.Undefined), INTEGERS([0] * 8))
                added = [builder.call(multiply_add, [spread, each[j], results[r][j]]) for j in VECTORS]
                results = [*results[:r], added, *results[r + 1 :]]
        for total, result in zip(chain(*sums), chain(*results), strict=True):
            total.add_incoming(result, loop)
        following = builder.add(i, I64(1))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", builder.mul(following, I64(2)), k), loop, after)
        builder.position_at_end(after)
        for r, row in enumerate(results):
            for j, result in enumerate(row):
                builder.store(result, at(out, I64(LINE * r + 32 * j), FLOATS), align=4)
        return context.get_dummy_value()

    def block(_: Any, weights: Any, x: Any, out: Any, k: Any, ahead: Any) -> Any:
        return types.void(weights, x, out, k, ahead), generate

    return intrinsic(block)


_rows_1, _rows_2, _rows_3, _rows_4, _rows_5, _rows_6 = (_of_rows(rows) for rows in range(1, ROWS + 1))
