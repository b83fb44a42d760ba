"""Codes as a layer holds them until they are packed for the products compiled for CPUs, one form for every format.

A weight ``[rows, in]`` has these tensors, each of whose entries belongs to one row. So rows are split, merged and
reordered as those of a plain weight:

    weight             uint8 [rows, in], or [rows, in / 2] with the first of two codes in the lower half
    weight_scale       [rows, in / group], in the type in which it is stored
    weight_zero_point  int8 [rows, in / group], of integers whose zero is not in the middle of their range
    weight_scale_2     float32 [rows, 1], another factor, only beside scales in FP8

``codes.py`` tells what they mean. A group is made so small that it is whole on each rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from qnext_plugin.checkpoint.codes import PER_BYTE, coded
from qnext_plugin.checkpoint.dequantization import Stored
from qnext_plugin.checkpoint.formats import Leaves, stored_format
from qnext_plugin.checkpoint.headers import Shape
from qnext_plugin.checkpoint.layouts import FP8_BLOCK

WEIGHT, SCALE, ZERO_POINT, OUTER = "weight", "weight_scale", "weight_zero_point", "weight_scale_2"
_KINDS = {"fp8": "e4m3", "mxfp8": "e4m3", "int8": "i8", "mxfp4": "e2m1", "nvfp4": "e2m1", "awq": "u4"}
_MIDDLE = {"u4": 8, "i8": 0}
_SCALES = {
    **{"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"U8": torch.uint8, "F8_E8M0": torch.uint8, "F8_E4M3": torch.float8_e4m3fn},
}


@dataclass(frozen=True)
class Codes:
    """The kind of a weight's codes, the dtype of its scales and how many inputs share a scale."""

    kind: str
    scale: torch.dtype
    group: int
    has_zero_point: bool = False

    def zeros(self, rows: int, inputs: int) -> dict[str, Tensor]:
        """Return tensors of zeros for a weight ``[rows, inputs]``, by the last segments of their names."""
        groups = inputs // self.group
        leaves = {WEIGHT: torch.zeros(rows, inputs // PER_BYTE[self.kind], dtype=torch.uint8)}
        leaves[SCALE] = torch.zeros(rows, groups, dtype=self.scale)
        if self.has_zero_point:
            leaves[ZERO_POINT] = torch.zeros(rows, groups, dtype=torch.int8)
        if self.scale == torch.float8_e4m3fn:
            leaves[OUTER] = torch.zeros(rows, 1, dtype=torch.float32)
        return leaves


def common(found: Iterable[Codes]) -> Codes:
    """Return the codes that can hold all of several weights; raises ``ValueError`` if there are none."""
    first, *others = found
    for other in others:
        if replace(other, group=first.group) != first:
            raise ValueError("its parts are stored in different ways")
        first = replace(first, group=gcd(first.group, other.group))
    return first


def stored_codes(leaves: Leaves, shape: Shape, config: Mapping[str, Any], ranks: int = 1) -> Codes:
    """Return the codes that hold a module's weight of ``shape``, if each of ``ranks`` takes a part of its inputs.

    ``leaves`` fit a known format; ``config`` is the ``quantization_config``. Raises ``ValueError`` with the reason if
    the compiled products cannot take the weight. Whether groups are in order is known only from the tensors.
    """
    (rows, columns), name = shape, stored_format(leaves)
    if "weight_g_idx" in leaves or (name == "gptq" and config.get("desc_act")):
        raise ValueError("its groups are not of consecutive inputs")
    kind = _KINDS.get(name) or ("i8" if _bits(leaves, columns) == 8 else "u4")
    if kind == "u4" and name != "awq" and _bits(leaves, columns) != 4:
        raise ValueError(f"it has {_bits(leaves, columns)} bits")
    has_zero_point = name == "awq" or (name == "gptq" and not config.get("sym")) or ZERO_POINT in leaves
    if kind == "e4m3" and has_zero_point:
        raise ValueError("it is FP8 with zero points")
    by_columns = "scales" in leaves
    scale = next(leaves[leaf] for leaf in ("scales", "weight_scale_inv", "weight_scale") if leaf in leaves)
    per_scale = columns // scale.shape[0] if by_columns else _inputs_per_scale(scale.shape, rows, columns)
    if columns % per_scale or (by_columns and columns % scale.shape[0]):
        raise ValueError("its last group of inputs is shorter than the others")
    if scale.dtype not in _SCALES:
        raise ValueError(f"its scales are {scale.dtype}")
    if columns % ranks:
        raise ValueError(f"{ranks} ranks cannot split its inputs")
    inputs, least = columns // ranks, 4 * PER_BYTE[kind]
    group = gcd(per_scale, inputs)
    if inputs % PER_BYTE[kind] or (group % least and group != inputs):
        raise ValueError(f"a rank's groups would be of {group} inputs, and the products take multiples of {least}")
    return Codes(kind, _SCALES[scale.dtype], group, has_zero_point)


def _bits(leaves: Leaves, columns: int) -> int:
    words = leaves["qweight"].shape[0] if "qweight" in leaves else leaves["weight_packed"].shape[1]
    return 32 * words // columns


def _inputs_per_scale(scale: Shape, rows: int, columns: int) -> int:
    """Return how many inputs share a scale that is stored per tensor, row, group of inputs or block."""
    if len(scale) < 2 or scale == (1, 1):
        return columns
    return columns // scale[1] if len(scale) == 2 and scale[0] == rows else FP8_BLOCK


def to_codes(tensors: Stored, codes: Codes, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a module's stored tensors as those of ``Codes.zeros``; both have the last segments of their names.

    Raises ``ValueError`` if they are stored as other codes, or are not as ``config`` declares them.
    """
    found = coded(tensors, config)
    has_zeros = found.zeros is not None
    as_served = (found.kind, found.scales.dtype) == (codes.kind, codes.scale) and has_zeros >= codes.has_zero_point
    if not as_served or found.group % codes.group:
        raise ValueError(
            f"weights found as {found.kind} with {found.scales.dtype} scales in groups of {found.group}, expected them "
            f"as they are served, {codes}: start with the new weights"
        )
    zeros, split = found.zeros, found.group // codes.group
    if zeros is not None and not codes.has_zero_point:
        if (zeros != _MIDDLE[codes.kind]).any():
            raise ValueError("zero points are not all in the middle, but quantization_config has sym: set it to false")
        zeros = None
    leaves = {WEIGHT: found.codes, SCALE: _split(found.scales, split)}
    if zeros is not None:
        leaves[ZERO_POINT] = _split(zeros, split)
    if found.outer is not None:
        leaves[OUTER] = found.outer[:, None]
    return leaves


def _split(entries: Tensor, parts: int) -> Tensor:
    """Repeat each group's entry for its ``parts``."""
    if parts == 1:
        return entries
    # Not every operation knows FP8, which bytes can stand for.
    plain = entries.contiguous().view(torch.uint8) if entries.itemsize == 1 else entries
    return plain.repeat_interleave(parts, 1).view(entries.dtype)
