"""The inner loops over packed weights, generated for the width of this CPU's vectors.

A ``Decoder`` turns a line of codes into vectors in registers. ``product`` is a loop that multiplies them by a few rows,
``tile`` one that stores them as float32, for many rows. Integers are multiplied in pairs, by inputs rounded to int16,
and summed in int32 within a part of a group; FP8 becomes float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qnext_plugin.ops.cpu.packing import BLOCK, CODES, E2M1, LINE, SCALES

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
LANES = 16 if {"+avx512bw", "+avx512vl"} <= FEATURES else 8
"""32-bit numbers in a vector."""
DOTS = ("+avxvnni" if LANES == 8 else "+avx512vnni") in FEATURES
"""Whether one instruction multiplies pairs and adds."""
VECTORS = range(BLOCK // LANES)
TOGETHER = 4  # blocks that are read at once for one row
TOGETHER_FOR_ROWS = LANES // 8  # for more rows
FEW_ROWS = 4  # the most rows that are computed at once from codes
ROWS = 6 if LANES == 8 else 12  # from float32: sums fill 12 registers, weights and an input need others
AHEAD = 2048  # bytes of a block that are fetched before they are read
E2M1_OFFSET = 12  # makes twice an FP4 number positive

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
INTEGERS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(ir.FloatType(), LANES)
HALVES, BYTES = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)


class Builder(ir.IRBuilder):
    """An ``IRBuilder`` for loops over memory at addresses that are integers."""

    def at(self, address: Any, offset: int | Any, kind: Any) -> Any:
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.inttoptr(self.add(address, offset), kind.as_pointer())

    def read(self, address: Any, offset: int | Any, kind: Any) -> Any:
        return self.load(self.at(address, offset, kind), align=1)

    def write(self, value: Any, address: Any, offset: int | Any) -> None:
        self.store(value, self.at(address, offset, value.type), align=1)

    def spread(self, address: Any, offset: int | Any, kind: Any) -> Any:
        """Load a number into every lane of a vector of ``kind``."""
        one = self.read(address, offset, kind.element)
        return self.repeat(one, kind)

    def repeat(self, one: Any, kind: Any) -> Any:
        first = self.insert_element(kind(ir.Undefined), one, I32(0))
        return self.shuffle_vector(first, kind(ir.Undefined), INTEGERS([0] * LANES))

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.call(self.module.declare_intrinsic(name, (), kind), arguments)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.intrinsic(f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)

    def add_pairs(self, total: Any, a: Any, b: Any) -> Any:
        """Add the products of pairs of int16 to int32."""
        if DOTS:
            words = [self.bitcast(pairs, INTEGERS) for pairs in (a, b)]
            return self.intrinsic(f"llvm.x86.avx512.vpdpwssd.{32 * LANES}", INTEGERS, total, *words)
        name = "llvm.x86.avx2.pmadd.wd" if LANES == 8 else "llvm.x86.avx512.pmaddw.d.512"
        return self.add(total, self.intrinsic(name, INTEGERS, a, b))

    def prefetch(self, address: Any, offset: int) -> None:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        fetch = self.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        self.call(fetch, [self.at(address, offset, I8), I32(0), I32(3), I32(1)])

    def loop(self, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Run ``body(i, values)`` for ``i`` below ``count``, which is at least 1; returns the last values."""
        before, inside = self.block, self.append_basic_block()
        self.branch(inside)
        self.position_at_end(inside)
        i = self.phi(I64)
        i.add_incoming(I64(0), before)
        values = [self.phi(value.type) for value in initial]
        for value, first in zip(values, initial, strict=True):
            value.add_incoming(first, before)
        results = body(i, values)
        following, last, after = self.add(i, I64(1)), self.block, self.append_basic_block()
        i.add_incoming(following, last)
        for value, result in zip(values, results, strict=True):
            value.add_incoming(result, last)
        self.cbranch(self.icmp_signed("<", following, count), inside, after)
        self.position_at_end(after)
        return results


@dataclass(frozen=True)
class Function:
    """A compiled function of ``arguments`` integers, whose code ``body`` builds."""

    name: str
    arguments: int
    body: Callable[..., None]


@dataclass(frozen=True)
class Decoder:
    """How a line becomes vectors.

    ``decode`` takes the address of a line and returns its steps, each a list of the vectors of the block's outputs. A
    step is one input in float32, or a pair in int16 if ``pairs``. ``per_line`` is how many inputs a line has.
    """

    name: str
    per_line: int
    pairs: bool
    decode: Callable[[Builder, Any], list[list[Any]]]

    @property
    def steps(self) -> int:
        return self.per_line // 2 if self.pairs else self.per_line


def _u4(b: Builder, line: Any) -> list[list[Any]]:
    words = [b.read(line, 4 * LANES * v, HALVES) for v in VECTORS]
    mask, twelve = HALVES([15] * 2 * LANES), HALVES([12] * 2 * LANES)
    fields = [[b.and_(b.lshr(word, HALVES([4 * j] * 2 * LANES)), mask) for word in words] for j in range(1, 3)]
    return [[b.and_(word, mask) for word in words], *fields, [b.lshr(word, twelve) for word in words]]


def _e2m1(b: Builder, line: Any) -> list[list[Any]]:
    """Look up twice the number plus ``E2M1_OFFSET``, which is a byte."""
    table = BYTES([int(2 * value) + E2M1_OFFSET for value in E2M1] * (LANES // 4))
    look_up = "llvm.x86.avx2.pshuf.b" if LANES == 8 else "llvm.x86.avx512.pshuf.b.512"
    steps: list[list[Any]] = [[] for _ in range(4)]
    for v in VECTORS:
        word = b.read(line, 4 * LANES * v, HALVES)
        for nibble in range(2):
            shifted = b.lshr(word, HALVES([4] * 2 * LANES)) if nibble else word
            codes = b.and_(b.bitcast(shifted, BYTES), BYTES([15] * 4 * LANES))
            values = b.bitcast(b.intrinsic(look_up, BYTES, table, codes), HALVES)
            steps[nibble].append(b.and_(values, HALVES([255] * 2 * LANES)))
            steps[2 + nibble].append(b.lshr(values, HALVES([8] * 2 * LANES)))
    return steps


def _i8(b: Builder, line: Any) -> list[list[Any]]:
    words = [b.read(line, 4 * LANES * v, HALVES) for v in VECTORS]
    eight = HALVES([8] * 2 * LANES)
    return [[b.ashr(b.shl(word, eight), eight) for word in words], [b.ashr(word, eight) for word in words]]


def _e4m3(b: Builder, line: Any) -> list[list[Any]]:
    """Shift codes to where float16 has its exponent, which makes them ``2 ** -8`` of their value, and convert."""
    half = ir.VectorType(ir.HalfType(), LANES)
    mask, one, eight = (HALVES([value] * 2 * LANES) for value in (0xBF80 - 0x10000, 1, 8))
    steps: list[list[Any]] = [[] for _ in range(4)]
    for v in VECTORS:  # each has all outputs
        word = b.read(line, 4 * LANES * v, HALVES)
        for which, shifted in enumerate((b.shl(word, eight), word)):
            bits = b.and_(b.ashr(shifted, one), mask)
            for part in range(2):
                lanes = ir.VectorType(I32, LANES)([part * LANES + j for j in range(LANES)])
                values = b.bitcast(b.shuffle_vector(bits, HALVES(ir.Undefined), lanes), half)
                step = 2 * v + which if LANES == 8 else 2 * part + which
                steps[step].append(b.fpext(values, FLOATS))
    return steps


def _f32(b: Builder, line: Any) -> list[list[Any]]:
    return [[b.read(line, 4 * LANES * v, FLOATS) for v in VECTORS]]


DECODERS = {
    "u4": Decoder("u4", 8, True, _u4),
    "e2m1": Decoder("e2m1", 8, True, _e2m1),
    "i8": Decoder("i8", 4, True, _i8),
    "e4m3": Decoder("e4m3", 4, False, _e4m3),
    "f32": Decoder("f32", 1, False, _f32),
}


def product(decoder: Decoder, rows: int, together: int = 1) -> Function:
    """Return a function that multiplies ``rows`` rows by ``together`` blocks and adds to ``out``. It computes::

        out[r, b] += sum_c (sum_i x[c, i, r] codes[b, c, i] - zeros[b, c] sums[c, r]) scales[b, c] factors[c, r]

    ``c`` counts ``chunks``, parts of a group, ``i`` their inputs. All arguments are integers: ``weights`` is the
    address of a block's lines, the next block is ``apart`` bytes away, a chunk has ``lines``. ``scales`` is float32
    [together, chunks, 2, BLOCK] with scales and zero points, ``x`` [inputs, rows], float32 or pairs of int16,
    ``factors`` float32 [chunks, 2, rows] with factors and sums, ``out`` float32 [rows, TOGETHER, BLOCK]. The decoder
    ``f32`` has neither scales nor factors, and a single chunk.
    """
    scaled = decoder.name != "f32"

    def body(b: Builder, weights: Any, apart: Any, scales: Any, x: Any, factors: Any, out: Any, *counts: Any) -> None:
        chunks, lines = counts
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
                        b.prefetch(here, AHEAD)
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

    return Function(f"product_{decoder.name}_{rows}_{together}", 8, body)


def tile(decoder: Decoder) -> Function:
    """Return a function that stores a block's weights as float32 ``out`` [inputs, BLOCK].

    Its arguments are ``weights``, ``scales``, ``out``, ``chunks`` and ``lines``, as in ``product``.
    """

    def body(b: Builder, weights: Any, scales: Any, out: Any, chunks: Any, lines: Any) -> None:
        def chunk(c: Any, _: list[Any]) -> list[Any]:
            table = b.add(scales, b.mul(c, I64(8 * BLOCK)))
            factors = [b.read(table, 4 * LANES * v, FLOATS) for v in VECTORS]
            zeros = [b.read(table, 4 * (BLOCK + LANES * v), FLOATS) for v in VECTORS]

            def line(j: Any, _: list[Any]) -> list[Any]:
                at = b.add(b.mul(c, lines), j)
                to = b.add(out, b.mul(at, I64(4 * BLOCK * decoder.per_line)))
                steps = decoder.decode(b, b.add(weights, b.mul(at, I64(LINE))))
                for s, (v, vector) in ((s, pair) for s, step in enumerate(steps) for pair in enumerate(step)):
                    for half, value in enumerate(_floats(b, vector) if decoder.pairs else [vector]):
                        value = b.fsub(value, zeros[v]) if decoder.pairs else value
                        place = s * (2 if decoder.pairs else 1) + half
                        b.write(b.fmul(value, factors[v]), to, 4 * (place * BLOCK + v * LANES))
                return []

            b.loop(lines, [], line)
            return []

        b.loop(chunks, [], chunk)

    return Function(f"tile_{decoder.name}", 5, body)


def _floats(b: Builder, pairs: Any) -> list[Any]:
    words, sixteen = b.bitcast(pairs, INTEGERS), INTEGERS([16] * LANES)
    return [b.sitofp(b.ashr(word, sixteen), FLOATS) for word in (b.shl(words, sixteen), words)]


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
    """Return an intrinsic that calls one of ``functions``: its arguments are an index and theirs, all integers.

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
        index, *arguments = values
        after = builder.append_basic_block()
        cases = builder.switch(index, after)
        for i, function in enumerate(functions):
            block = builder.append_basic_block()
            cases.add_case(index.type(i), block)
            builder.position_at_end(block)
            builder.call(define(builder.module, function), arguments)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    def of_five(_: Any, index: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return types.void(types.int64, *[types.int64] * 5), call

    def of_eight(_: Any, index: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
        return types.void(types.int64, *[types.int64] * 8), call

    return intrinsic(of_five if functions[0].arguments == 5 else of_eight)


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
TABLES = [table(scales) for scales in SCALES]
