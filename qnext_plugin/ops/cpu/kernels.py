"""The inner loops over packed weights, generated for the width of this CPU's vectors.

A ``Decoder`` turns a line of codes into vectors in registers. ``product`` is a loop that multiplies them by a few rows,
``tile`` one that stores them as float32, for many rows. Integers are multiplied in pairs, by inputs rounded to int16,
and summed in int32 within a part of a group; FP8 becomes float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from qnext_plugin.ops.cpu.packing import BLOCK, E2M1, LINE

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
LANES = 16 if {"+avx512bw", "+avx512vl"} <= FEATURES else 8
"""32-bit numbers in a vector."""
VECTORS = range(BLOCK // LANES)
TOGETHER = 4  # the most blocks that are read at once
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
        first = self.insert_element(kind(ir.Undefined), one, I32(0))
        return self.shuffle_vector(first, kind(ir.Undefined), INTEGERS([0] * LANES))

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.call(self.module.declare_intrinsic(name, (), kind), arguments)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.intrinsic(f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)

    def multiply_pairs(self, a: Any, b: Any) -> Any:
        name = "llvm.x86.avx2.pmadd.wd" if LANES == 8 else "llvm.x86.avx512.pmaddw.d.512"
        return self.intrinsic(name, INTEGERS, a, b)

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


def product(decoder: Decoder, rows: int, together: int = 1) -> Any:
    """Return an intrinsic that multiplies ``rows`` rows by ``together`` blocks and adds to ``out``. It computes::

        out[r, b] += sum_c (sum_i x[c, i, r] codes[b, c, i] - zeros[b, c] sums[c, r]) scales[b, c] factors[c, r]

    ``c`` counts ``chunks``, parts of a group, ``i`` their inputs. In the compiled loop all arguments are integers:
    ``weights`` is the address of a block's lines, the next block is ``apart`` bytes away, a chunk has ``lines``.
    ``scales`` is float32 [together, chunks, 2, BLOCK] with scales and zero points, ``x`` [inputs, rows], float32 or
    pairs of int16, ``factors`` float32 [chunks, 2, rows] with factors and sums, ``out`` float32 [rows, TOGETHER,
    BLOCK]. The decoder ``f32`` has neither scales nor factors, and a single chunk.
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
                    for s, step in enumerate(decoder.decode(b, here)):
                        for r in range(rows):
                            one = b.spread(address, 4 * (s * rows + r), number)
                            for v in VECTORS:
                                k = (i * rows + r) * len(VECTORS) + v
                                if decoder.pairs:
                                    product = b.multiply_pairs(step[v], b.bitcast(one, HALVES))
                                    totals[k] = b.add(totals[k], product)
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

    return _function(f"product_{decoder.name}_{rows}_{together}", 8, body)


def tile(decoder: Decoder) -> Any:
    """Return an intrinsic that stores a block's weights as float32 ``out`` [inputs, BLOCK].

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

    return _function(f"tile_{decoder.name}", 5, body)


def _floats(b: Builder, pairs: Any) -> list[Any]:
    words, sixteen = b.bitcast(pairs, INTEGERS), INTEGERS([16] * LANES)
    return [b.sitofp(b.ashr(word, sixteen), FLOATS) for word in (b.shl(words, sixteen), words)]


def _function(name: str, arguments: int, body: Callable[..., None]) -> Any:
    """Return an intrinsic of integers that calls ``body`` compiled as a function.

    It is a separate function because LLVM groups the stores of several loops in one and spills the sums.
    """

    def call(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = Builder(function.append_basic_block())
        body(inside, *function.args)
        inside.ret_void()
        builder.call(function, values)
        return context.get_dummy_value()

    if arguments == 5:

        def typed(_: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
            return types.void(a, b, c, d, e), call

    else:

        def typed(_: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
            return types.void(a, b, c, d, e, f, g, h), call

    return intrinsic(typed)


def products_of(name: str) -> list[Any]:
    """Return the loops of a decoder for 1, 2, 3 and 4 rows, and for one row and TOGETHER blocks."""
    return [*(product(DECODERS[name], rows) for rows in range(1, 5)), product(DECODERS[name], 1, TOGETHER)]


__all__ = ["DECODERS", "TOGETHER", "chain"]
