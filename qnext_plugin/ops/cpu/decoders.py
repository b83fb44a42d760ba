"""Codes in packed weights become vectors in registers, of the width that this CPU has.

Integers become int16 in pairs, FP8 becomes float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core.registry import cpu_target

from qnext_plugin.checkpoint.dequantization import E2M1
from qnext_plugin.ops.cpu.packing import BLOCK

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
LANES = 16 if {"+avx512bw", "+avx512vl"} <= FEATURES else 8
"""32-bit numbers in a vector."""
DOTS = ("+avxvnni" if LANES == 8 else "+avx512vnni") in FEATURES
"""Whether one instruction multiplies pairs and adds."""
VECTORS = range(BLOCK // LANES)
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

    def prefetch(self, address: Any) -> None:
        """Fetch a line into the second cache: what is read next of several blocks can be more than the first holds."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        fetch = self.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        self.call(fetch, [self.at(address, 0, I8), I32(0), I32(2), I32(1)])

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
