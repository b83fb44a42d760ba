"""Compiled products with packed bfloat16 weights on CPUs: one parallel loop computes all matrices of a layer.

oneDNN packs the weights. For few rows its own products read them at two thirds of the rate that memory allows, and
wait for all threads after each matrix. Its blocks are 64 outputs by all inputs, with two inputs of an output next to
each other, as AVX512-BF16 takes them. That layout is not documented, so ``readable`` tests each packed matrix.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from qnext_plugin.ops.cpu.jit import in_parallel, pointer, share

BLOCK = 64
ROWS = 6  # rows computed at once: their sums fill 24 of the 32 registers, weights and an input fill the others
BYTES_OF_INPUT = 2 * BLOCK  # bytes of a block's weights for one input


def available() -> bool:
    """Return whether these kernels can run here; the first call compiles them.

    They are not used on CPUs with AMX, for which oneDNN has kernels.
    """
    instructions = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return instructions and in_parallel(_region) is not None


def readable(matrix: Tensor, n: int, k: int) -> bool:
    """Return whether ``matrix``, an [n, k] that oneDNN has packed, has the layout that we expect."""
    if not available() or k % 2 or torch.ops.mkldnn._nbytes(matrix) != 2 * _padded(n) * k:
        return False
    x = torch.linspace(-1, 1, k).bfloat16().unsqueeze(0)
    expected = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    found = products(x, [torch.ops.mkldnn.data_ptr(matrix)], [1], n)
    largest = float(expected.abs().max())  # a comparison of zeros would prove nothing
    return largest > 0 and torch.allclose(found, expected, rtol=2**-6, atol=2**-6 * largest)


def products(x: Tensor, addresses: Sequence[int] | np.ndarray, counts: Sequence[int], n: int) -> Tensor:
    """Multiply the rows of ``x`` [T, k], in order: the next ``counts[i]`` by the packed [n, k] at ``addresses[i]``.

    Returns [T, n].
    """
    x = x.contiguous()
    rows, k = x.shape
    out = torch.empty(rows, _padded(n), dtype=x.dtype)
    matrices = np.array([addresses, counts], np.int64)
    run = in_parallel(_region)
    assert run is not None
    run(np.array([len(counts), _padded(n), k, x.data_ptr(), out.data_ptr(), matrices.ctypes.data], np.int64))
    return out[:, :n]


def _padded(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _region(data: Any) -> None:
    """Compute one thread's share of all products, each of a block and at most ``ROWS`` rows."""
    a = carray(data, 6, np.int64)
    n, k, x, out = a[1], a[2], a[3], a[4]
    addresses, counts = carray(pointer(a[5]), (2, a[0]), np.int64)
    blocks = n // BLOCK
    first, last = share(blocks * ((counts + ROWS - 1) // ROWS).sum())
    row = 0
    for matrix, count in zip(addresses, counts):  # noqa: B905
        parts = (count + ROWS - 1) // ROWS
        # While a block is read more than once, the next one is fetched from memory.
        ahead = BYTES_OF_INPUT * k if parts > 1 else 0
        for job in range(max(first, 0), min(last, blocks * parts)):
            block, part = job // parts, job % parts
            begin, end = row + count * part // parts, row + count * (part + 1) // parts
            weights, sums = matrix + BYTES_OF_INPUT * k * block, out + 2 * (n * begin + BLOCK * block)
            _block(end - begin, weights, x + 2 * k * begin, sums, k, n, ahead)
        row, first, last = row + count, first - blocks * parts, last - blocks * parts


@njit
def _block(rows: Any, weights: Any, x: Any, out: Any, k: Any, n: Any, ahead: Any) -> None:
    if rows == 1:
        _rows_1(weights, x, out, k, n, ahead)
    elif rows == 2:
        _rows_2(weights, x, out, k, n, ahead)
    elif rows == 3:
        _rows_3(weights, x, out, k, n, ahead)
    elif rows == 4:
        _rows_4(weights, x, out, k, n, ahead)
    elif rows == 5:
        _rows_5(weights, x, out, k, n, ahead)
    else:
        _rows_6(weights, x, out, k, n, ahead)


class BFloat(ir.Type):
    """LLVM's type ``bfloat``, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


I32, I64, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
INTEGERS, FLOATS = ir.VectorType(I32, 16), ir.VectorType(ir.FloatType(), 16)
PAIRS, ROUNDED = ir.VectorType(BFloat(), 32), ir.VectorType(BFloat(), 16)
VECTORS = range(BLOCK // 16)


def _of_rows(rows: int) -> Any:
    """Return an intrinsic for ``rows`` rows. It computes::

        out[r, :64] = sum_i x[r, 2 i] weights[i, :64, 0] + x[r, 2 i + 1] weights[i, :64, 1]

    In the compiled loop ``weights``, ``x`` and ``out`` are addresses. A row of ``x`` has ``k`` elements, a row of
    ``out`` has ``n``. The loop also fetches the memory that is ``ahead`` bytes after the weights.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, x, out, k, n, ahead = arguments
        declare = builder.module.declare_intrinsic
        dot = declare("llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS]))
        fetch = declare("llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]))

        def at(address: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        i = builder.phi(I64)
        i.add_incoming(I64(0), before)
        sums = [[builder.phi(FLOATS) for _ in VECTORS] for _ in range(rows)]
        here = builder.add(weights, builder.mul(i, I64(2 * BYTES_OF_INPUT)))
        loaded = []
        for j in VECTORS:
            loaded.append(builder.bitcast(builder.load(at(here, I64(64 * j), INTEGERS), align=2), PAIRS))
            builder.call(fetch, [at(builder.add(here, ahead), I64(64 * j), ir.IntType(8)), I32(0), I32(2), I32(1)])
        for r, row in enumerate(sums):
            offset = builder.add(builder.mul(I64(2 * r), k), builder.mul(i, I64(4)))
            pair = builder.load(at(x, offset, I32), align=2)
            first = builder.insert_element(INTEGERS(ir.Undefined), pair, I32(0))
            spread = builder.shuffle_vector(first, INTEGERS(ir.Undefined), INTEGERS([0] * 16))
            for total, weight in zip(row, loaded, strict=True):
                total.add_incoming(FLOATS([0.0] * 16), before)
                total.add_incoming(builder.call(dot, [total, builder.bitcast(spread, PAIRS), weight]), loop)
        following = builder.add(i, I64(1))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", builder.mul(following, I64(2)), k), loop, after)
        builder.position_at_end(after)
        for r, row in enumerate(sums):
            for j, total in enumerate(row):
                result = builder.fptrunc(total.incomings[1][0], ROUNDED)
                builder.store(result, at(out, builder.add(builder.mul(I64(2 * r), n), I64(32 * j)), ROUNDED), align=2)
        return context.get_dummy_value()

    def block(_: Any, weights: Any, x: Any, out: Any, k: Any, n: Any, ahead: Any) -> Any:
        return types.void(weights, x, out, k, n, ahead), generate

    return intrinsic(block)


_rows_1, _rows_2, _rows_3, _rows_4, _rows_5, _rows_6 = (_of_rows(rows) for rows in range(1, ROWS + 1))
