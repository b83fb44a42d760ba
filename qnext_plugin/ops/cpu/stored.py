"""Weights in the codes of a checkpoint (``checkpoint/codes.py``), packed for the products of ``quantized.py``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qnext_plugin.checkpoint.layer_codes import OUTER, PER_BYTE, SCALE, WEIGHT, ZERO_POINT, Codes
from qnext_plugin.ops.cpu import packing, quantized
from qnext_plugin.ops.cpu.packing import Form
from qnext_plugin.ops.instructions import multiplies_codes


def serves() -> bool:
    """Return whether quantized weights are served in their codes here; the first call compiles the products."""
    return multiplies_codes() and quantized.available()


def pack(codes: Codes, leaves: Mapping[str, Tensor]) -> tuple[Form, Tensor]:
    """Pack the tensors of ``codes`` for a weight [rows, in], or for several, [matrices, rows, in], one after the other.

    Returns the form and what ``packing.pack`` returns. Raises ``ValueError`` for weights that are not finite.
    """
    *matrices, rows, width = leaves[WEIGHT].shape
    form = packing.form(codes.kind, codes.scale, width * PER_BYTE[codes.kind], codes.group, codes.has_zero_point)
    if not matrices:
        return form, _packed(form, leaves)
    packed = torch.empty(*matrices, *form.packed_shape(rows), dtype=torch.uint8)
    for i in range(len(packed)):
        packed[i] = _packed(form, {leaf: tensor[i] for leaf, tensor in leaves.items()})
    return form, packed


def _packed(form: Form, leaves: Mapping[str, Tensor]) -> Tensor:
    values, outer = leaves[WEIGHT], leaves.get(OUTER)
    if form.bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    return packing.pack(form, values, leaves[SCALE], leaves.get(ZERO_POINT), None if outer is None else outer[..., 0])


def unpack(form: Form, packed: Tensor, rows: int) -> dict[str, Tensor]:
    """Undo ``pack``; ``rows`` are those of one weight."""
    values, scale, zero_point, outer = packing.unpack(form, packed, rows)
    if form.bits == 4:
        values = values[..., ::2] | values[..., 1::2] << 4
    found = {WEIGHT: values, SCALE: scale, ZERO_POINT: zero_point, OUTER: None if outer is None else outer[..., None]}
    return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}
