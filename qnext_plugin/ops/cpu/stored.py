"""Weights in the codes of a checkpoint (``checkpoint/codes.py``), packed for the products of ``quantized.py``."""

from collections.abc import Mapping

from torch import Tensor

from qnext_plugin.checkpoint.codes import PER_BYTE
from qnext_plugin.checkpoint.layer_codes import OUTER, SCALE, WEIGHT, ZERO_POINT, Codes
from qnext_plugin.ops.cpu import packer, packing, quantized
from qnext_plugin.ops.cpu.packing import Form
from qnext_plugin.ops.instructions import multiplies_codes


def serves() -> bool:
    """Return whether quantized weights are served in their codes here; the first call compiles the products."""
    return multiplies_codes() and quantized.available()


def pack(codes: Codes, leaves: Mapping[str, Tensor]) -> tuple[Form, Tensor]:
    """Pack the tensors of ``codes`` for a weight [rows, in], or for several, [matrices, rows, in], one after the other.

    Returns the form and what ``packer.pack`` returns. Raises ``ValueError`` for weights that are not finite.
    """
    width, outer = leaves[WEIGHT].shape[-1], leaves.get(OUTER)
    form = packing.form(codes.kind, codes.scale, width * PER_BYTE[codes.kind], codes.group, codes.has_zero_point)
    factors = None if outer is None else outer[..., 0]
    return form, packer.pack(form, leaves[WEIGHT], leaves[SCALE], leaves.get(ZERO_POINT), factors)


def unpack(form: Form, packed: Tensor, rows: int) -> dict[str, Tensor]:
    """Undo ``pack``; ``rows`` are those of one weight."""
    values, scale, zero_point, outer = packing.unpack(form, packed, rows)
    found = {WEIGHT: values, SCALE: scale, ZERO_POINT: zero_point, OUTER: None if outer is None else outer[..., None]}
    return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}
