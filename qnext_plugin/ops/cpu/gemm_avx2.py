"""Compiled products with bfloat16 weights, for CPUs that have AVX2 and no bfloat16 instructions.

On such CPUs torch multiplies bfloat16 ten times as slowly as float32. Here weights stay bfloat16 in memory and are
converted to float32 in registers, which costs a shift or a mask. Few rows run at the speed of memory, many rows at
the speed of float32.
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

from qnext_plugin.ops.cpu import pages
from qnext_plugin.ops.cpu.jit import bounds, in_parallel, pointer, rounded, share, thread_num

BLOCK = 16  # outputs computed at once
ROWS = 6  # rows computed at once: their sums fill 12 of the 16 registers, weights and an input fill the others
PARTS = 8  # parts of up to ROWS rows that stay in a core's cache while all weights are read
TOGETHER = 4  # the most blocks that are read at once
LINE = 4 * BLOCK  # bytes of a block's weights for two inputs


@cache
def available() -> bool:
    """Return whether these kernels can run here and are needed; the first call compiles them."""
    needed = torch.cpu._is_avx2_supported() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return needed and in_parallel(_region) is not None


def pack(weights: Tensor) -> Tensor:
    """Pack bfloat16 ``weights`` [..., n, k], ``k`` even, for ``products``.

    The result has blocks of outputs, each ordered by pairs of inputs. Returns [..., n rounded up to BLOCK, k].
    """
    n = weights.shape[-2]
    padded = F.pad(weights, (0, 0, 0, -n % BLOCK)) if n % BLOCK else weights.contiguous()
    pairs = padded.view(torch.int32).unflatten(-2, (-1, BLOCK))
    return _transposed(pairs).view(padded.shape)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Undo ``pack``; returns the weights [..., n, k]."""
    *_, padded, k = packed.shape
    pairs = packed.view(torch.int32).unflatten(-2, (padded // BLOCK, BLOCK)).flatten(-2).unflatten(-1, (k // 2, BLOCK))
    return _transposed(pairs).view(packed.shape)[..., :n, :]


def _transposed(pairs: Tensor) -> Tensor:
    """Transpose ``pairs`` and return them as contiguous bfloat16, also if a dimension is 1.

    Copying a pair as one element is three times as fast as copying two.
    """
    return pages.empty(pairs.mT.shape, pairs.dtype).copy_(pairs.mT).view(torch.bfloat16)


def products(
    x: Tensor,
    packed: Tensor,
    used: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rows of ``x`` by packed matrices: the next ``counts[i]`` of the ``rows`` by matrix ``used[i]``.

    By default all rows are multiplied by the first matrix. ``x`` [T, k] is bfloat16 or float32, ``packed``
    [matrices, padded n, k] or [padded n, k], ``rows`` [R] int64 indices, by default each row once. Returns
    [R, padded n] in ``dtype``, bfloat16 or float32. Sums are in float32.
    """
    assert packed.is_contiguous() and x.shape[-1] == packed.shape[-1]
    x, rows = x.contiguous(), None if rows is None else rows.contiguous()
    n, k = packed.shape[-2:]
    num_rows = (x if rows is None else rows).shape[0]
    counts = (num_rows,) if counts is None else counts
    out = torch.empty(num_rows, n, dtype=dtype)
    scratch = torch.empty(torch.get_num_threads(), ROWS * (PARTS * k + TOGETHER * BLOCK), dtype=torch.int32)
    sizes = (len(counts), n, k, x.shape[0], num_rows, x.element_size(), out.element_size())
    addresses = (packed.data_ptr(), x.data_ptr(), 0 if rows is None else rows.data_ptr(), out.data_ptr())
    run = in_parallel(_region)
    assert run is not None
    run(np.array([*sizes, *addresses, scratch.data_ptr(), *used, *counts], np.int64))
    return out


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Multiply ``x`` [T, k] by one matrix of ``n`` outputs, add ``bias`` and round once; returns [T, n] bfloat16."""
    if bias is None:
        return products(x, packed)[:, :n]
    return (products(x, packed, dtype=torch.float32)[:, :n] + bias).to(torch.bfloat16)


def _region(data: Any) -> None:
    """Compute one thread's share of all products, each of a block and at most ``ROWS`` rows."""
    a = carray(data, 12, np.int64)
    n, k, num_rows, x_bytes, out_bytes = a[1], a[2], a[4], a[5], a[6]
    x16, x32 = carray(pointer(a[8]), (a[3], k), np.uint16), carray(pointer(a[8]), (a[3], k), np.uint32)
    rows = carray(pointer(a[9]), (num_rows,), np.int64)
    out16, out32 = carray(pointer(a[10]), (num_rows, n), np.uint16), carray(pointer(a[10]), (num_rows, n), np.uint32)
    own = a[11] + 4 * ROWS * (PARTS * k + TOGETHER * BLOCK) * thread_num()
    sums_at = own + 4 * PARTS * ROWS * k
    sums = carray(pointer(sums_at), (ROWS, TOGETHER, BLOCK), np.uint32)
    used, counts = carray(data, 12 + 2 * a[0], np.int64)[12:].reshape(2, a[0])
    blocks = n // BLOCK
    first, last = share(blocks * ((counts + ROWS - 1) // ROWS).sum())
    row = 0
    for which, count in zip(used, counts):  # noqa: B905
        parts = (count + ROWS - 1) // ROWS
        filled = -1
        job, stop = max(first, 0), min(last, blocks * parts)
        while job < stop:
            tile = job // (blocks * PARTS)
            size = min(PARTS, parts - tile * PARTS)
            within = job - tile * blocks * PARTS
            block, part = within // size, within % size
            if tile != filled:
                filled = tile
                for i in range(size):
                    begin, end = bounds(row, count, parts, tile * PARTS + i)
                    panel = carray(pointer(own + 4 * ROWS * k * i), (k, end - begin), np.uint32)
                    for r in range(begin, end):
                        source = rows[r] if a[9] else r
                        if x_bytes == 2:
                            for j in range(k):
                                panel[j, r - begin] = np.uint32(x16[source, j]) << np.uint32(16)
                        else:
                            for j in range(k):
                                panel[j, r - begin] = x32[source, j]
            begin, end = bounds(row, count, parts, tile * PARTS + part)
            together = _together(end - begin) if parts == 1 else 1
            if job + together > stop:
                together = 1
            weights = a[7] + LINE // 2 * k * (which * blocks + block)
            _blocks(end - begin, together, weights, own + 4 * ROWS * k * part, sums_at, k)
            for r in range(begin, end):
                for b in range(together):
                    for j in range(BLOCK):
                        bits = sums[r - begin, b, j]
                        if out_bytes == 2:
                            out16[r, (block + b) * BLOCK + j] = rounded(bits)
                        else:
                            out32[r, (block + b) * BLOCK + j] = bits
            job += together
        row, first, last = row + count, first - blocks * parts, last - blocks * parts


@njit
def _together(rows: Any) -> Any:
    """Return how many blocks to read at once: a core reads faster from several places than from one."""
    return 4 if rows == 1 else 2 if rows == 2 else 1


@njit
def _blocks(rows: Any, together: Any, weights: Any, x: Any, out: Any, k: Any) -> None:
    if together == 4:
        _rows_1_together(weights, x, out, k)
    elif together == 2:
        _rows_2_together(weights, x, out, k)
    elif rows == 1:
        _rows_1(weights, x, out, k)
    elif rows == 2:
        _rows_2(weights, x, out, k)
    elif rows == 3:
        _rows_3(weights, x, out, k)
    elif rows == 4:
        _rows_4(weights, x, out, k)
    elif rows == 5:
        _rows_5(weights, x, out, k)
    else:
        _rows_6(weights, x, out, k)


I32, I64, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
FLOAT, INTEGERS, FLOATS = ir.FloatType(), ir.VectorType(I32, 8), ir.VectorType(ir.FloatType(), 8)
VECTORS = range(BLOCK // 8)


def _of_rows(rows: int, together: int = 1) -> Any:
    """Return an intrinsic for ``rows`` rows and for the blocks that are read ``together``. It computes::

        out[r, b, :16] = sum_i x[i, 0, r] weights[b, i, :16, 0] + x[i, 1, r] weights[b, i, :16, 1]

    In the compiled loop ``weights``, ``x`` and ``out`` are addresses. ``x`` has ``k`` inputs of ``rows`` numbers each,
    ``out`` has TOGETHER blocks in each row.
    """

    def define(module: Any) -> Any:
        """Define a separate function: with several loops in one, LLVM groups the stores and spills the sums."""
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), f"rows_{rows}_blocks_{together}")
        function.linkage = "internal"
        function.attributes.add("noinline")
        weights, x, out, k = function.args
        before, loop, after = (function.append_basic_block() for _ in range(3))
        builder = ir.IRBuilder(before)
        multiply_add = module.declare_intrinsic("llvm.fma.v8f32", (), ir.FunctionType(FLOATS, [FLOATS] * 3))
        fetch = module.declare_intrinsic("llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]))
        same = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")

        def at(address: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        def half(address: Any, which: int) -> Any:
            pair = builder.load(builder.inttoptr(address, INTEGERS.as_pointer()), align=2)
            lower, upper = INTEGERS([16] * 8), INTEGERS([-(1 << 16)] * 8)
            return builder.bitcast(builder.and_(pair, upper) if which else builder.shl(pair, lower), FLOATS)

        size = builder.mul(k, I64(LINE // 2))
        starts = [builder.add(weights, builder.mul(size, I64(b))) for b in range(together)]
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(I64)
        i.add_incoming(I64(0), before)
        sums = [[[builder.phi(FLOATS) for _ in VECTORS] for _ in range(rows)] for _ in range(together)]
        for total in chain(*chain(*sums)):
            total.add_incoming(FLOATS([0.0] * 8), before)
        lines = [builder.add(start, builder.mul(i, I64(LINE))) for start in starts]
        if together == 1:
            # Prefetch the next block, at four places in turn.
            apart = builder.mul(builder.and_(i, I64(3)), builder.lshr(k, I64(3)))
            ahead = builder.mul(builder.add(apart, builder.lshr(i, I64(2))), I64(LINE))
            builder.call(fetch, [at(builder.add(weights, size), ahead, ir.IntType(8)), I32(0), I32(2), I32(1)])
        inputs = builder.add(x, builder.mul(i, I64(2 * 4 * rows)))
        results = [[list(row) for row in block] for block in sums]
        for block, line in zip(results, lines, strict=True):
            for which in range(2):
                # For the most rows, weights are loaded twice: holding both halves takes one register too many.
                address = builder.call(same, [line]) if which and rows == ROWS else line
                halves = [half(builder.add(address, I64(32 * j)), which) for j in VECTORS]
                for r, row in enumerate(block):
                    one = builder.load(at(inputs, I64(4 * (which * rows + r)), FLOAT), align=4)
                    first = builder.insert_element(FLOATS(ir.Undefined), one, I32(0))
                    spread = builder.shuffle_vector(first, FLOATS(ir.Undefined), INTEGERS([0] * 8))
                    for j in VECTORS:
                        row[j] = builder.call(multiply_add, [spread, halves[j], row[j]])
        for total, result in zip(chain(*chain(*sums)), chain(*chain(*results)), strict=True):
            total.add_incoming(result, loop)
        following = builder.add(i, I64(1))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", builder.mul(following, I64(2)), k), loop, after)
        builder.position_at_end(after)
        for b, block in enumerate(results):
            for r, row in enumerate(block):
                for j, result in enumerate(row):
                    builder.store(result, at(out, I64(4 * ((r * TOGETHER + b) * BLOCK + 8 * j)), FLOATS), align=4)
        builder.ret_void()
        return function

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(define(builder.module), arguments)
        return context.get_dummy_value()

    def block(_: Any, weights: Any, x: Any, out: Any, k: Any) -> Any:
        return types.void(weights, x, out, k), call

    return intrinsic(block)


_rows_1, _rows_2, _rows_3, _rows_4, _rows_5, _rows_6 = (_of_rows(rows) for rows in range(1, ROWS + 1))
_rows_1_together, _rows_2_together = _of_rows(1, 4), _of_rows(2, 2)
