"""Layouts of the Gated DeltaNet input projections: *grouped* in the checkpoint, *flat* in the model.

A group is a key head and its ``r = num_v_heads / num_k_heads`` value heads. Output rows are, per group,

    in_proj_qkvz   q (head_k_dim)   k (head_k_dim)   v (r * head_v_dim)   z (r * head_v_dim)
    in_proj_ba     b (r)            a (r)

in the checkpoint. ``ungroup`` reorders them once, at load, to the sections ``[q | k | v | z]`` and ``[b | a]`` with
heads in order, which a merged column-parallel loader shards section by section; ``regroup`` is its inverse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from qnext_plugin.config import GatedDeltaNetDims

Kind = Literal["qkvz", "ba"]

FP8_BLOCK = 128
STANDARD_ORDER = tuple(range(8))
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class TensorLayout:
    """How a stored tensor holds the projection's output rows.

    ``axis`` runs over the rows; ``None`` means that the tensor has none and stays as stored. ``packing`` gives, for
    int32 words that hold several rows, the position in the word of each row (8 rows of 4 bits; other widths only in
    standard order). ``per_block`` allows one entry per 128 rows, and ``per_tensor`` a single one.
    """

    axis: int | None
    packing: tuple[int, ...] | None = None
    per_block: bool = False
    per_tensor: bool = False


_ROWS, _COLUMNS, _UNCHANGED = TensorLayout(0), TensorLayout(1), TensorLayout(None)
_SCALE = TensorLayout(0, per_block=True, per_tensor=True)
_UNQUANTISED = {
    "weight": _ROWS,  # [rows, in]
    "bias": _ROWS,  # [rows]
    "lora_A.weight": _UNCHANGED,  # [rank, in]
    "lora_B.weight": _ROWS,  # [rows, rank]
}

LAYOUTS: Mapping[str | None, Mapping[str, TensorLayout]] = MappingProxyType(
    {
        None: _UNQUANTISED,
        "fp8": {
            **_UNQUANTISED,
            "weight_scale": _SCALE,  # [1] or [rows, 1]
            "weight_scale_inv": TensorLayout(0, per_block=True),  # [rows / 128, in / 128]
            "input_scale": _UNCHANGED,  # per tensor
        },
        "gptq": {
            **_UNQUANTISED,
            "qweight": _COLUMNS,  # [in / pack, rows], packed along the inputs
            "scales": _COLUMNS,  # [in / group, rows]
            "qzeros": TensorLayout(1, packing=STANDARD_ORDER),  # [in / group, rows / pack]
            "g_idx": _UNCHANGED,  # [in]
        },
        "awq": {
            **_UNQUANTISED,
            "qweight": TensorLayout(1, packing=AWQ_ORDER),  # [in, rows / 8]
            "scales": _COLUMNS,  # [in / group, rows]
            "qzeros": TensorLayout(1, packing=AWQ_ORDER),  # [in / group, rows / 8]
        },
        "compressed-tensors": {
            **_UNQUANTISED,
            "weight_packed": _ROWS,  # [rows, in / pack]
            "weight_scale": _SCALE,  # [1], [rows, 1], [rows, in / group] or [rows / 128, in / 128]
            "weight_zero_point": TensorLayout(0, packing=STANDARD_ORDER),  # int32 [rows / pack, in / group], or int8
            "weight_shape": _UNCHANGED,  # [2]
            "weight_g_idx": _UNCHANGED,  # [in]
            "weight_global_scale": _UNCHANGED,  # per tensor
            "input_scale": _UNCHANGED,
            "input_zero_point": _UNCHANGED,
            "input_global_scale": _UNCHANGED,
        },
        "modelopt": {
            **_UNQUANTISED,  # FP8 [rows, in]; NVFP4 uint8 [rows, in / 2]
            "weight_scale": _SCALE,  # [], [rows], [rows, in / 16] or [rows / 128, 1, in / 128, 1]
            "weight_scale_2": _UNCHANGED,  # per tensor
            "input_scale": _UNCHANGED,
        },
    }
)
"""By ``quant_method`` of the checkpoint's ``quantization_config`` (None: not quantised), then by parameter suffix.
Layers that a quantised checkpoint leaves in bf16 are in every table. Sources: vLLM's
``model_executor/layers/quantization/{fp8,auto_gptq,auto_awq,modelopt}.py`` and ``compressed_tensors/compressors``."""


def section_sizes(dims: GatedDeltaNetDims, kind: Kind) -> tuple[int, ...]:
    """Rows of each section of the flat projection: ``(q, k, v, z)`` or ``(b, a)``."""
    if kind == "qkvz":
        return dims.key_dim, dims.key_dim, dims.value_dim, dims.value_dim
    assert kind == "ba", kind
    return dims.num_v_heads, dims.num_v_heads


def row_order(dims: GatedDeltaNetDims, kind: Kind, granularity: int = 1) -> Tensor:
    """The permutation ``flat = grouped[row_order]``, as a LongTensor ``[rows / granularity]``.

    Each index moves ``granularity`` consecutive rows. ``ValueError`` if a segment of a group is not a whole number
    of them.
    """
    segments = _segments(dims, kind)
    if not _divides(granularity, segments):
        raise ValueError(
            f"in_proj_{kind}: found {list(segments)} rows of {list(kind)} in a key-head group, expected multiples of "
            f"{granularity}, the rows that one entry covers; keep this projection grouped, or dequantise it"
        )
    sizes = [segment // granularity for segment in segments]
    groups = torch.arange(dims.num_k_heads * sum(sizes)).view(dims.num_k_heads, sum(sizes))
    return torch.cat([section.flatten() for section in groups.split(sizes, dim=1)])


def inverse_row_order(dims: GatedDeltaNetDims, kind: Kind, granularity: int = 1) -> Tensor:
    """The permutation ``grouped = flat[inverse_row_order]``; see ``row_order``."""
    return row_order(dims, kind, granularity).argsort()


def ungroup(
    tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str, quant_method: str | None = None
) -> Tensor:
    """One whole (unsharded) checkpoint tensor of ``in_proj_qkvz`` or ``in_proj_ba``, from grouped to flat row order.

    ``suffix`` is the parameter's name after the module's, such as ``"weight"`` or ``"lora_B.weight"``; ``LAYOUTS``
    holds those known for each ``quant_method``. The result has the tensor's shape and dtype; a tensor without
    output rows is returned itself. ``ValueError`` for an unknown suffix or method, for a shape that does not hold
    the projection's rows, and for scale blocks that straddle sections, as those of ``in_proj_ba`` do.
    """
    return _permute(tensor, dims, kind, suffix, quant_method, row_order)


def regroup(
    tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str, quant_method: str | None = None
) -> Tensor:
    """The inverse of ``ungroup``: from flat to grouped row order."""
    return _permute(tensor, dims, kind, suffix, quant_method, inverse_row_order)


def _permute(
    tensor: Tensor,
    dims: GatedDeltaNetDims,
    kind: Kind,
    suffix: str,
    quant_method: str | None,
    order: Callable[[GatedDeltaNetDims, Kind, int], Tensor],
) -> Tensor:
    layout = _layout(suffix, quant_method)
    per_tensor = layout.per_tensor and tensor.shape in ((), (1,))
    if layout.axis is None or per_tensor:
        return tensor
    where = f"in_proj_{kind}.{suffix}"
    rows = sum(section_sizes(dims, kind))
    found = tensor.shape[layout.axis] if layout.axis < tensor.ndim else 0
    if layout.packing and tensor.dtype == torch.int32:
        pack = _rows_per_word(where, rows, found, layout.packing)
        if not _divides(pack, _segments(dims, kind)):
            bits = 32 // pack
            positions = layout.packing[:pack]
            values = _unpack(tensor.movedim(layout.axis, -1), bits, positions)
            packed = _pack(values.index_select(-1, order(dims, kind, 1).to(tensor.device)), bits, positions)
            return packed.movedim(-1, layout.axis).contiguous()
        granularity = pack  # whole words move: nothing to unpack
    elif found == rows:
        granularity = 1
    elif layout.per_block and found == ceil(rows / FP8_BLOCK):
        granularity = FP8_BLOCK
    else:
        blocks = f" or {ceil(rows / FP8_BLOCK)}" if layout.per_block else ""
        raise ValueError(
            f"{where}: found shape {list(tensor.shape)}, expected {rows}{blocks} along axis {layout.axis}; "
            f"check that the tensor is whole and that config.json belongs to this checkpoint"
        )
    return tensor.index_select(layout.axis, order(dims, kind, granularity).to(tensor.device))


def _layout(suffix: str, quant_method: str | None) -> TensorLayout:
    if quant_method not in LAYOUTS:
        raise ValueError(f"quant_method is {quant_method!r}, expected one of {list(LAYOUTS)}; keep the layout grouped")
    layouts = LAYOUTS[quant_method]
    if suffix not in layouts:
        raise ValueError(
            f"parameter suffix is {suffix!r}, expected one of {list(layouts)} for quant_method {quant_method!r}; "
            f"keep the layout grouped"
        )
    return layouts[suffix]


def _segments(dims: GatedDeltaNetDims, kind: Kind) -> tuple[int, ...]:
    """Rows of each section within one key-head group."""
    assert dims.num_v_heads % dims.num_k_heads == 0, dims
    return tuple(size // dims.num_k_heads for size in section_sizes(dims, kind))


def _divides(granularity: int, segments: tuple[int, ...]) -> bool:
    return all(segment % granularity == 0 for segment in segments)


def _rows_per_word(where: str, rows: int, words: int, packing: tuple[int, ...]) -> int:
    """Packed checkpoints do not store their bit width; the shape gives it."""
    known = (8,) if packing == AWQ_ORDER else (4, 8)
    for pack in known:
        if words * pack == rows:
            return pack
    raise ValueError(
        f"{where}: found {words} packed words, expected {rows} rows at {' or '.join(map(str, known))} per word; "
        f"keep this projection grouped, or dequantise it"
    )


def _unpack(words: Tensor, bits: int, positions: tuple[int, ...]) -> Tensor:
    """int32 ``[..., words]`` to values ``[..., words * len(positions)]``."""
    shifts = torch.tensor(positions, dtype=torch.int32, device=words.device) * bits
    return ((words.unsqueeze(-1) >> shifts) & (1 << bits) - 1).flatten(-2)


def _pack(values: Tensor, bits: int, positions: tuple[int, ...]) -> Tensor:
    shifts = torch.tensor(positions, dtype=torch.int32, device=values.device) * bits
    return (values.unflatten(-1, (-1, len(positions))) << shifts).sum(-1, dtype=torch.int32)
