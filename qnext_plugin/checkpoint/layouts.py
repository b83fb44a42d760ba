"""Layouts of the Gated DeltaNet input projections: *grouped* in the checkpoint, *flat* in the model.

A group is a key head and its ``r = num_v_heads / num_k_heads`` value heads. In the checkpoint each group has these
output rows:

    in_proj_qkvz   q (head_k_dim)   k (head_k_dim)   v (r * head_v_dim)   z (r * head_v_dim)
    in_proj_ba     b (r)            a (r)

``ungroup`` reorders them once, at load, to the sections ``[q | k | v | z]`` and ``[b | a]`` with heads in order. A
merged column-parallel loader then shards section by section. ``regroup`` is the inverse. Packed words and blocks of a
quantized tensor move as a whole. If they hold rows of several sections, as those of ``in_proj_ba`` mostly do, the
projection must be dequantized first (``quantized_layers.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from qnext_plugin.config import GatedDeltaNetDims

Kind = Literal["qkvz", "ba"]
KINDS: Mapping[str, Kind] = MappingProxyType({"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"})

FP8_BLOCK = 128


@dataclass(frozen=True)
class TensorLayout:
    """A description of how a stored tensor holds the projection's output rows.

    ``axis`` runs over the rows; ``None`` means that the tensor has no rows and stays as stored. ``rows_per_entry``
    lists how many rows one entry may hold. ``per_tensor`` allows a single entry for all rows.
    """

    axis: int | None
    rows_per_entry: tuple[int, ...] = (1,)
    per_tensor: bool = False


_ROWS, _COLUMNS, _UNCHANGED = TensorLayout(0), TensorLayout(1), TensorLayout(None)
_SCALE = TensorLayout(0, rows_per_entry=(1, FP8_BLOCK), per_tensor=True)
LAYOUTS: Mapping[str, TensorLayout] = MappingProxyType(
    {
        "weight": _ROWS,  # [rows, in], FP4 [rows, in / 2]
        "bias": _ROWS,  # [rows]
        "lora_A.weight": _UNCHANGED,  # [rank, in]
        "lora_B.weight": _ROWS,  # [rows, rank]
        "weight_packed": _ROWS,  # [rows, in / pack]
        "weight_scale": _SCALE,  # [], [1], [rows], [rows, 1], [rows, groups] or of blocks, [rows / 128, ...]
        "weight_scale_inv": _SCALE,  # [rows / 128, in / 128]
        "weight_zero_point": TensorLayout(0, (1, 4, 8, FP8_BLOCK), per_tensor=True),  # as weight_scale, or packed
        "weight_shape": _UNCHANGED,  # [2]
        "weight_g_idx": _UNCHANGED,  # [in]
        "weight_global_scale": _UNCHANGED,  # per tensor, as all that follow
        "weight_scale_2": _UNCHANGED,
        "input_scale": _UNCHANGED,
        "input_zero_point": _UNCHANGED,
        "input_global_scale": _UNCHANGED,
        "qweight": TensorLayout(1, rows_per_entry=(1, 8)),  # GPTQ [in / pack, rows], AWQ [in, rows / 8]
        "scales": _COLUMNS,  # [groups, rows]
        "qzeros": TensorLayout(1, rows_per_entry=(4, 8, 16)),  # [groups, rows / pack]
        "g_idx": _UNCHANGED,  # [in]
    }
)
"""The keys are the last segments of the names of a module's tensors, in any of the formats (``formats.py``)."""


def section_sizes(dims: GatedDeltaNetDims, kind: Kind) -> tuple[int, ...]:
    """Return the number of rows of each section of the flat projection: ``(q, k, v, z)`` or ``(b, a)``."""
    if kind == "qkvz":
        return dims.key_dim, dims.key_dim, dims.value_dim, dims.value_dim
    assert kind == "ba", kind
    return dims.num_v_heads, dims.num_v_heads


def row_order(dims: GatedDeltaNetDims, kind: Kind, granularity: int = 1) -> Tensor:
    """Return the permutation ``flat = grouped[row_order]`` as a LongTensor ``[rows / granularity]``.

    Each index moves ``granularity`` consecutive rows. Raises ``ValueError`` if a segment of a group is not a multiple
    of ``granularity``.
    """
    segments = _segments(dims, kind)
    if not _divides(granularity, segments):
        raise ValueError(
            f"in_proj_{kind}: found {list(segments)} rows of {list(kind)} in a key-head group, expected multiples of "
            f"{granularity}, the rows that one entry covers; dequantize it first"
        )
    sizes = [segment // granularity for segment in segments]
    groups = torch.arange(dims.num_k_heads * sum(sizes)).view(dims.num_k_heads, sum(sizes))
    return torch.cat([section.flatten() for section in groups.split(sizes, dim=1)])


def inverse_row_order(dims: GatedDeltaNetDims, kind: Kind, granularity: int = 1) -> Tensor:
    """Return the permutation ``grouped = flat[inverse_row_order]``; see ``row_order``."""
    return row_order(dims, kind, granularity).argsort()


def ungroup(tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str) -> Tensor:
    """Reorder a whole (unsharded) checkpoint tensor of ``in_proj_qkvz`` or ``in_proj_ba`` from grouped to flat rows.

    ``suffix`` is the parameter's name after the module's name, such as ``"weight"`` or ``"lora_B.weight"``;
    ``LAYOUTS`` has all of them. The result has the tensor's shape and dtype; a tensor without output rows is returned
    as it is. Raises ``ValueError`` for an unknown suffix, for a shape that does not hold the projection's rows, and for
    blocks or packed words that straddle sections.
    """
    return _permute(tensor, dims, kind, suffix, row_order)


def regroup(tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str) -> Tensor:
    """Reorder a tensor from flat to grouped rows; the inverse of ``ungroup``."""
    return _permute(tensor, dims, kind, suffix, inverse_row_order)


def _permute(
    tensor: Tensor,
    dims: GatedDeltaNetDims,
    kind: Kind,
    suffix: str,
    order: Callable[[GatedDeltaNetDims, Kind, int], Tensor],
) -> Tensor:
    axis, granularity = _layout(suffix).axis, _granularity(tuple(tensor.shape), dims, kind, suffix)
    if axis is None or granularity is None:
        return tensor
    return tensor.index_select(axis, order(dims, kind, granularity).to(tensor.device))


def _granularity(shape: tuple[int, ...], dims: GatedDeltaNetDims, kind: Kind, suffix: str) -> int | None:
    """Return how many rows one entry along the layout's axis holds; None for a tensor without rows."""
    layout = _layout(suffix)
    if layout.axis is None or (layout.per_tensor and prod(shape) == 1):
        return None
    rows = sum(section_sizes(dims, kind))
    found = shape[layout.axis] if layout.axis < len(shape) else 0
    for granularity in layout.rows_per_entry:
        if found == ceil(rows / granularity):
            return granularity
    expected = " or ".join(str(ceil(rows / granularity)) for granularity in layout.rows_per_entry)
    raise ValueError(
        f"in_proj_{kind}.{suffix}: found shape {list(shape)}, expected {expected} along axis {layout.axis}; "
        f"check that the tensor is whole and that config.json belongs to this checkpoint"
    )


def can_ungroup(shapes: Mapping[str, tuple[int, ...]], dims: GatedDeltaNetDims, kind: Kind) -> bool:
    """Return whether every section of a projection is a whole number of words and blocks.

    ``shapes`` are those of the projection's tensors by suffix. Raises ``ValueError`` for unknown suffixes and shapes,
    as ``ungroup`` does.
    """
    held = [_granularity(shape, dims, kind, suffix) for suffix, shape in shapes.items()]
    return all(_divides(granularity or 1, _segments(dims, kind)) for granularity in held)


def _layout(suffix: str) -> TensorLayout:
    if suffix not in LAYOUTS:
        raise ValueError(f"parameter suffix is {suffix!r}, expected one of {list(LAYOUTS)}; dequantize it first")
    return LAYOUTS[suffix]


def _segments(dims: GatedDeltaNetDims, kind: Kind) -> tuple[int, ...]:
    """Return the number of rows of each section within one key-head group."""
    assert dims.num_v_heads % dims.num_k_heads == 0, dims
    return tuple(size // dims.num_k_heads for size in section_sizes(dims, kind))


def _divides(granularity: int, segments: tuple[int, ...]) -> bool:
    return all(segment % granularity == 0 for segment in segments)
