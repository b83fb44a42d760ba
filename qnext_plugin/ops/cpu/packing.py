"""The memory layout of packed quantized weights, which ``quantized.py`` multiplies as they are.

A weight is ``(code - zero) * scale * outer``. Codes have 4 or 8 bits, a scale and a zero point belong to a group of
inputs of one output, and ``outer`` belongs to an output. Blocks of BLOCK outputs are packed one after another; each is
its outer factors, its scales and its zero points, both ordered by group, and its codes, in lines of ``LINE`` bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16  # outputs of a block
LINE = 64  # bytes of a line of codes: 4 bytes of each output, so 8 inputs in 4 bits or 4 inputs in 8
CODES = ("u4", "e2m1", "i8", "e4m3")
"""The codes: unsigned integers of 4 bits, FP4, signed integers of 8 bits, FP8."""
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)
"""The dtypes of scales. A uint8 is an exponent, ``2 ** (scale - 127)``; only float8 comes with outer factors."""
MIDDLE = 8
"""The zero point of ``u4`` where none is stored; those of other codes are 0."""


class Form(NamedTuple):
    """How a matrix is packed. All fields are integers, so that an operator takes a form as a list of them.

    ``codes`` and ``scales`` are indices in ``CODES`` and ``SCALES``. ``k`` is the number of inputs, ``group`` how many
    of them share a scale, ``has_zeros`` whether zero points are stored.
    """

    codes: int
    scales: int
    k: int
    group: int
    has_zeros: int = 0

    @property
    def bits(self) -> int:
        return 4 if CODES[self.codes] in ("u4", "e2m1") else 8

    @property
    def per_line(self) -> int:
        """The inputs of a line. ``group`` is a multiple of it, except that one of ``k`` inputs may have any length."""
        return LINE // BLOCK * 8 // self.bits

    @property
    def padded_k(self) -> int:
        """Codes of 0 fill the last line of a group of ``k`` inputs."""
        return -(-self.k // self.per_line) * self.per_line

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """The bytes of a block before its scales, its zero points and its codes, and all of its bytes."""
        outer = 4 * BLOCK if SCALES[self.scales] == torch.float8_e4m3fn else 0
        zeros = outer + _in_lines(self.groups * BLOCK * SCALES[self.scales].itemsize)
        codes = zeros + _in_lines(self.groups * BLOCK * self.has_zeros)
        return outer, zeros, codes, codes + self.padded_k * BLOCK * self.bits // 8

    def packed_shape(self, n: int) -> tuple[int, int]:
        """Return the shape of a packed matrix of ``n`` outputs, in bytes."""
        return -(-n // BLOCK), self.offsets[-1]


def form(codes: str, scales: torch.dtype, k: int, group: int, has_zeros: bool = False) -> Form:
    """Return the form of a matrix of ``k`` inputs in groups of ``group``, or of one group if ``group`` is ``k``.

    Raises ``ValueError`` for groups that are no whole lines.
    """
    found = Form(CODES.index(codes), SCALES.index(scales), k, group, int(has_zeros))
    if group != k and (k % group or group % found.per_line):
        raise ValueError(f"groups of {group} inputs of {k}, expected a divisor that is a multiple of {found.per_line}")
    return found


def unpack(form: Form, packed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Undo ``packer.pack``; returns its ``codes``, ``scales``, ``zeros`` and ``outer``."""
    *batch, _, _ = packed.shape
    outer_end, zeros_at, codes_at, _ = form.offsets

    def section(start: int, dtype: torch.dtype, groups: int) -> Tensor:
        part = packed[..., start : start + groups * BLOCK * dtype.itemsize].contiguous().view(dtype)
        return part.unflatten(-1, (groups, BLOCK)).mT.flatten(-3, -2)[..., :n, :].contiguous()

    scales = section(outer_end, SCALES[form.scales], form.groups)
    zeros = section(zeros_at, torch.int8, form.groups) if form.has_zeros else None
    outer = section(0, torch.float32, 1)[..., 0] if outer_end else None
    order = _order(form, len(batch))
    inner = [(BLOCK, form.padded_k // form.per_line, 2, 2)[i - len(batch) - 1] for i in order[len(batch) + 1 :]]
    lines = packed[..., codes_at:].unflatten(-1, inner).permute([order.index(i) for i in range(len(order))])
    if form.bits == 4:
        first, second = lines.unbind(-1)
        lines = torch.stack([first & 15 | second << 4, first >> 4 | second & 240], -1)
    codes = lines.flatten(len(batch) + 2).flatten(len(batch), len(batch) + 1)
    return codes[..., :n, : form.k * form.bits // 8].contiguous(), scales, zeros, outer


def _in_lines(size: int) -> int:
    return -(-size // LINE) * LINE


def _order(form: Form, batch: int) -> list[int]:
    """Return the order of [..., block, output, line, byte, half] in memory.

    The four bytes of an output are a pair of 16-bit halves, which are neighboring inputs, as multiplication takes them
    in pairs. For FP8 an output has one such half in each half of the line.
    """
    places = (1, 2, 0, 3) if CODES[form.codes] == "e4m3" else (1, 0, 3, 2)
    return [*range(batch + 1), *(batch + 1 + place for place in places)]
