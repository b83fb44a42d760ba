"""The inner loops over packed weights, generated for the width of this CPU's vectors.

``product`` multiplies decoded weights by a few rows, ``tile`` stores them as float32, for many rows, ``table`` stores
their scales. Integers are multiplied in pairs, by inputs rounded to int16, and summed in int32 within a part of a
group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qnext_plugin.ops.cpu.decoders import (
    DECODERS,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    INTEGERS,
    LANES,
    VECTORS,
    Builder,
    Decoder,
)
from qnext_plugin.ops.cpu.packing import BLOCK, CODES, LINE, SCALES

TOGETHER = 4  # blocks that are read at once for one row
TOGETHER_FOR_ROWS = LANES // 8  # for more rows
FEW_ROWS = 4  # the most rows that are computed at once from codes
ROWS = 6 if LANES == 8 else 12  # from float32: sums fill 12 registers, weights and an input need others


@dataclass(frozen=True)
class Function:
    """A compiled function of ``arguments`` integers, whose code ``body`` builds."""

    name: str
    arguments: int
    body: Callable[..., None]


def product(decoder: Decoder, rows: int, together: int = 1) -> Function:
    """Return a function that multiplies ``rows`` rows by ``together`` blocks and adds to ``out``. It computes::

        out[r, b] += sum_c (sum_i x[c, i, r] codes[b, c, i] - zeros[b, c] sums[c, r]) scales[b, c] factors[c, r]

    ``c`` counts ``chunks``, parts of a group, ``i`` their inputs. All arguments are integers: ``weights`` is the
    address of a block's lines, the next block is ``apart`` bytes away, a chunk has ``lines``; ``ahead`` bytes after
    each line is what is fetched for later. ``scales`` is float32 [together, chunks, 2, BLOCK] with scales and zero
    points, ``x`` [inputs, rows], float32 or pairs of int16, ``factors`` float32 [chunks, 2, rows] with factors and
    sums, ``out`` float32 [rows, TOGETHER, BLOCK]. The decoder ``f32`` has neither scales nor factors, and a single
    chunk; nothing is fetched for it.
    """
    scaled = decoder.name != "f32"

    def body(b: Builder, weights: Any, apart: Any, ahead: Any, scales: Any, x: Any, *more: Any) -> None:
        factors, out, chunks, lines = more
        starts = [b.add(weights, b.mul(apart, I64(i))) for i in range(together)]
        tables = [b.add(scales, b.mul(chunks, I64(8 * BLOCK * i))) for i in range(together)]
        same = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")
        number = INTEGERS if decoder.pairs else FLOATS
        zero = [number([0 if decoder.pairs else 0.0] * LANES)] * (together * rows * len(VECTORS))

        def place(i: int, r: int, v: int) -> int:
            return 4 * ((r * TOGETHER + i) * BLOCK + v * LANES)

        places = [(i, r, v) for i in range(together) for r in range(rows) for v in VECTORS]

        def chunk(c: Any, _: list[Any]) -> list[Any]:
            def line(j: Any, sums: list[Any]) -> list[Any]:
                at = b.add(b.mul(c, lines), j)
                inputs = b.add(x, b.mul(at, I64(4 * rows * decoder.steps)))
                totals = list(sums)
                for i, start in enumerate(starts):
                    # Inputs are loaded again for each block: all of them and the sums would take too many registers.
                    address = b.call(same, [inputs]) if i else inputs
                    here = b.add(start, b.mul(at, I64(LINE)))
                    if scaled:
                        b.prefetch(b.add(here, ahead))
                    for s, step in enumerate(decoder.decode(b, here)):
                        for r in range(rows):
                            one = b.spread(address, 4 * (s * rows + r), number)
                            for v in VECTORS:
                                k = (i * rows + r) * len(VECTORS) + v
                                if decoder.pairs:
                                    totals[k] = b.add_pairs(totals[k], step[v], b.bitcast(one, HALVES))
                                else:
                                    totals[k] = b.multiply_add(one, step[v], totals[k])
                return totals

            initial = zero if scaled else [b.read(out, place(*p), FLOATS) for p in places]
            sums = b.loop(lines, initial, line)
            if scaled:
                by_row = b.add(factors, b.mul(c, I64(8 * rows)))
                for total, (i, r, v) in zip(sums, places, strict=True):
                    table = b.add(tables[i], b.mul(c, I64(8 * BLOCK)))
                    scale = b.read(table, 4 * LANES * v, FLOATS)
                    if decoder.pairs:
                        total = b.sitofp(total, FLOATS)
                        offset = b.spread(by_row, 4 * (rows + r), FLOATS)
                        zeros = b.read(table, 4 * (BLOCK + LANES * v), FLOATS)
                        total = b.multiply_add(zeros, offset, total)
                        scale = b.fmul(scale, b.spread(by_row, 4 * r, FLOATS))
                    b.write(b.multiply_add(total, scale, b.read(out, place(i, r, v), FLOATS)), out, place(i, r, v))
            else:
                for total, p in zip(sums, places, strict=True):
                    b.write(total, out, place(*p))
            return []

        b.loop(chunks, [], chunk)

    return Function(f"product_{decoder.name}_{rows}_{together}", 9, body)


def tile(decoder: Decoder, dtype: torch.dtype = torch.float32) -> Function:
    """Return a function that stores a block's weights as ``out`` [inputs, BLOCK] in ``dtype``, float32 or bfloat16.

    Its arguments are ``weights``, ``scales``, ``out``, ``chunks`` and ``lines``, as in ``product``.
    """

    def body(b: Builder, weights: Any, scales: Any, out: Any, chunks: Any, lines: Any) -> None:
        def chunk(c: Any, _: list[Any]) -> list[Any]:
            table = b.add(scales, b.mul(c, I64(8 * BLOCK)))
            factors = [b.read(table, 4 * LANES * v, FLOATS) for v in VECTORS]
            zeros = [b.read(table, 4 * (BLOCK + LANES * v), FLOATS) for v in VECTORS]

            def line(j: Any, _: list[Any]) -> list[Any]:
                at = b.add(b.mul(c, lines), j)
                to = b.add(out, b.mul(at, I64(dtype.itemsize * BLOCK * decoder.per_line)))
                steps = decoder.decode(b, b.add(weights, b.mul(at, I64(LINE))))
                for s, (v, vector) in ((s, pair) for s, step in enumerate(steps) for pair in enumerate(step)):
                    for half, value in enumerate(_floats(b, vector) if decoder.pairs else [vector]):
                        value = b.fsub(value, zeros[v]) if decoder.pairs else value
                        value, place = b.fmul(value, factors[v]), s * (2 if decoder.pairs else 1) + half
                        value = _rounded(b, value) if dtype == torch.bfloat16 else value
                        b.write(value, to, dtype.itemsize * (place * BLOCK + v * LANES))
                return []

            b.loop(lines, [], line)
            return []

        b.loop(chunks, [], chunk)

    return Function(f"tile_{decoder.name}_{8 * dtype.itemsize}", 5, body)


def _floats(b: Builder, pairs: Any) -> list[Any]:
    words, sixteen = b.bitcast(pairs, INTEGERS), INTEGERS([16] * LANES)
    return [b.sitofp(b.ashr(word, sixteen), FLOATS) for word in (b.shl(words, sixteen), words)]


def _rounded(b: Builder, floats: Any) -> Any:
    """Return the bits of the nearest bfloat16, ties to even; ``floats`` are finite."""
    bits, sixteen = b.bitcast(floats, INTEGERS), INTEGERS([16] * LANES)
    odd = b.and_(b.lshr(bits, sixteen), INTEGERS([1] * LANES))
    up = b.add(b.add(bits, INTEGERS([0x7FFF] * LANES)), odd)
    return b.trunc(b.lshr(up, sixteen), ir.VectorType(I16, LANES))


def table(scales: torch.dtype) -> Function:
    """Return a function that stores a block's scales and zero points as ``product`` takes them.

    Its arguments are the addresses of the scales [groups, BLOCK], of zero points in int8 or 0, of outer factors, and
    of ``out`` [groups, repeats, 2, BLOCK]; ``groups``, ``repeats``, and the bits of two float32: what scales are
    multiplied by, and the zero point where none are stored.
    """
    half, zero_points = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(I8, LANES)
    bits = 8 * scales.itemsize
    stored = ir.VectorType(ir.IntType(bits), LANES)

    def decode(b: Builder, number: Any) -> Any:
        if scales == torch.float16:
            return b.fpext(b.bitcast(number, half), FLOATS)
        if scales == torch.float8_e4m3fn:
            wide = b.sext(number, ir.VectorType(I16, LANES))
            shifted = b.and_(b.shl(wide, wide.type([7] * LANES)), wide.type([0xBF80 - 0x10000] * LANES))
            return b.fmul(b.fpext(b.bitcast(shifted, half), FLOATS), FLOATS([256.0] * LANES))
        wide = number if bits == 32 else b.zext(number, INTEGERS)
        if scales == torch.uint8:
            denormal = b.icmp_unsigned("==", wide, INTEGERS([0] * LANES))
            exponent = b.shl(wide, INTEGERS([23] * LANES))
            wide = b.select(denormal, INTEGERS([1 << 22] * LANES), exponent)
        return b.bitcast(b.shl(wide, INTEGERS([16] * LANES)) if bits == 16 else wide, FLOATS)

    def body(
        b: Builder, start: Any, zeros: Any, outer: Any, out: Any, groups: Any, repeats: Any, *numbers: Any
    ) -> None:
        factor, default = (b.repeat(b.bitcast(b.trunc(number, I32), ir.FloatType()), FLOATS) for number in numbers)
        stores_zeros = b.icmp_signed("!=", zeros, I64(0))
        factors = [factor] * len(VECTORS)
        if scales == torch.float8_e4m3fn:
            factors = [b.fmul(factor, b.read(outer, 4 * LANES * v, FLOATS)) for v in VECTORS]

        def group(g: Any, _: list[Any]) -> list[Any]:
            here, pair = b.mul(g, I64(BLOCK)), []
            for v in VECTORS:
                at = b.add(here, I64(LANES * v))
                scale = decode(b, b.read(start, b.mul(at, I64(bits // 8)), stored))
                zero = b.read(b.select(stores_zeros, zeros, start), at, zero_points)
                pair.append((b.fmul(scale, factors[v]), b.select(stores_zeros, b.sitofp(zero, FLOATS), default)))

            def repeat(i: Any, _: list[Any]) -> list[Any]:
                to = b.mul(b.add(b.mul(g, repeats), i), I64(8 * BLOCK))
                for v, (scale, zero) in enumerate(pair):
                    b.write(scale, out, b.add(to, I64(4 * LANES * v)))
                    b.write(zero, out, b.add(to, I64(4 * (BLOCK + LANES * v))))
                return []

            b.loop(repeats, [], repeat)
            return []

        b.loop(groups, [], group)

    return Function(f"table_{str(scales).removeprefix('torch.')}", 8, body)


def choice(functions: Sequence[Function]) -> Any:
    """Return an intrinsic that calls one of ``functions``: its arguments are an index and a tuple of theirs.

    They are separate functions because LLVM groups the stores of several loops in one and spills the sums.
    """

    def define(module: Any, function: Function) -> Any:
        if function.name in module.globals:
            return module.globals[function.name]
        kind = ir.FunctionType(ir.VoidType(), [I64] * function.arguments)
        defined = ir.Function(module, kind, function.name)
        defined.linkage = "internal"
        defined.attributes.add("noinline")
        inside = Builder(defined.append_basic_block())
        function.body(inside, *defined.args)
        inside.ret_void()
        return defined

    def call(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        index, arguments = values
        after = builder.append_basic_block()
        cases = builder.switch(index, after)
        for i, function in enumerate(functions):
            block = builder.append_basic_block()
            cases.add_case(index.type(i), block)
            builder.position_at_end(block)
            builder.call(define(builder.module, function), cgutils.unpack_tuple(builder, arguments))
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    def typed(_: Any, index: Any, arguments: Any) -> Any:
        return types.void(types.int64, types.UniTuple(types.int64, functions[0].arguments)), call

    return intrinsic(typed)


PRODUCTS = [
    product(DECODERS[codes], rows, together)
    for codes in CODES
    for rows in range(1, FEW_ROWS + 1)
    for together in (1, TOGETHER if rows == 1 else TOGETHER_FOR_ROWS)
]
"""Those for one block and for several, by number of rows and kind of codes; then those from float32."""
FLOATS_AT = len(PRODUCTS) - ROWS // 2
"""The index of the product from float32 of 0 rows; those of at least half of ROWS exist."""
PRODUCTS += [product(DECODERS["f32"], rows) for rows in range(ROWS // 2, ROWS + 1)]
TILES = [tile(DECODERS[codes]) for codes in CODES]
BFLOAT16_TILES = [tile(DECODERS[codes], torch.bfloat16) for codes in CODES]
TABLES = [table(scales) for scales in SCALES]
