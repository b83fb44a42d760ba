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
from math import ceil
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
_UNQUANTIZED = {
    "weight": _ROWS,  # [rows, in]
    "bias": _ROWS,  # [rows]
    "lora_A.weight": _UNCHANGED,  # [rank, in]
    "lora_B.weight": _ROWS,  # [rows, rank]
}

LAYOUTS: Mapping[str | None, Mapping[str, TensorLayout]] = MappingProxyType(
    {
        None: _UNQUANTIZED,
        "fp8": {
            **_UNQUANTIZED,
            "weight_scale": _SCALE,  # [1] or [rows, 1]
            "weight_scale_inv": TensorLayout(0, rows_per_entry=(FP8_BLOCK,)),  # [rows / 128, in / 128]
            "input_scale": _UNCHANGED,  # per tensor
        },
        "gptq": {
            **_UNQUANTIZED,
            "qweight": _COLUMNS,  # [in / pack, rows], packed along the inputs
            "scales": _COLUMNS,  # [in / group, rows]
            "qzeros": TensorLayout(1, rows_per_entry=(4, 8)),  # [in / group, rows / pack]
            "g_idx": _UNCHANGED,  # [in]
        },
        "awq": {
            **_UNQUANTIZED,
            "qweight": TensorLayout(1, rows_per_entry=(8,)),  # [in, rows / 8]
            "scales": _COLUMNS,  # [in / group, rows]
            "qzeros": TensorLayout(1, rows_per_entry=(8,)),  # [in / group, rows / 8]
        },
        "compressed-tensors": {
            **_UNQUANTIZED,
            "weight_packed": _ROWS,  # [rows, in / pack]
            "weight_scale": _SCALE,  # [1], [rows, 1], [rows, in / group] or [rows / 128, in / 128]
            "weight_zero_point": TensorLayout(0, rows_per_entry=(1, 4, 8)),  # int8 [rows, groups], packed or not
            "weight_shape": _UNCHANGED,  # [2]
            "weight_g_idx": _UNCHANGED,  # [in]
            "weight_global_scale": _UNCHANGED,  # per tensor
            "input_scale": _UNCHANGED,
            "input_zero_point": _UNCHANGED,
            "input_global_scale": _UNCHANGED,
        },
        "modelopt": {
            **_UNQUANTIZED,  # FP8 [rows, in]; NVFP4 uint8 [rows, in / 2]
            "weight_scale": _SCALE,  # [], [rows], [rows, in / 16] or [rows / 128, 1, in / 128, 1]
            "weight_scale_2": _UNCHANGED,  # per tensor
            "input_scale": _UNCHANGED,
        },
    }
)
"""The keys are ``quant_method`` of the checkpoint's ``quantization_config`` (None: not quantized), then the suffix.
Every table has the suffixes of layers that a quantized checkpoint leaves in bf16. The sources are vLLM's
``model_executor/layers/quantization/{fp8,auto_gptq,auto_awq,modelopt}.py`` and ``compressed_tensors/compressors``."""


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


def ungroup(
    tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str, quant_method: str | None = None
) -> Tensor:
    """Reorder a whole (unsharded) checkpoint tensor of ``in_proj_qkvz`` or ``in_proj_ba`` from grouped to flat rows.

    ``suffix`` is the parameter's name after the module's name, such as ``"weight"`` or ``"lora_B.weight"``;
    ``LAYOUTS`` has the known suffixes of each ``quant_method``. The result has the tensor's shape and dtype; a tensor
    without output rows is returned as it is. Raises ``ValueError`` for an unknown suffix or method, for a shape that
    does not hold the projection's rows, and for blocks or packed words that straddle sections.
    """
    return _permute(tensor, dims, kind, suffix, quant_method, row_order)


def regroup(
    tensor: Tensor, dims: GatedDeltaNetDims, kind: Kind, suffix: str, quant_method: str | None = None
) -> Tensor:
    """Reorder a tensor from flat to grouped rows; the inverse of ``ungroup``."""
    return _permute(tensor, dims, kind, suffix, quant_method, inverse_row_order)


def _permute(
    tensor: Tensor,
    dims: GatedDeltaNetDims,
    kind: Kind,
    suffix: str,
    quant_method: str | None,
    order: Callable[[GatedDeltaNetDims, Kind, int], Tensor],
) -> Tensor:
    axis = _layout(suffix, quant_method).axis
    granularity = _granularity(tuple(tensor.shape), dims, kind, suffix, quant_method)
    if axis is None or granularity is None:
        return tensor
    return tensor.index_select(axis, order(dims, kind, granularity).to(tensor.device))


def _granularity(
    shape: tuple[int, ...], dims: GatedDeltaNetDims, kind: Kind, suffix: str, quant_method: str | None
) -> int | None:
    """Return how many rows one entry along the layout's axis holds; None for a tensor without rows."""
    layout = _layout(suffix, quant_method)
    if layout.axis is None or (layout.per_tensor and shape in ((), (1,))):
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


def can_ungroup(
    shapes: Mapping[str, tuple[int, ...]], dims: GatedDeltaNetDims, kind: Kind, quant_method: str | None
) -> bool:
    """Return whether every section of a projection is a whole number of words and blocks.

    ``shapes`` are those of the projection's tensors by suffix. Raises ``ValueError`` for unknown suffixes and shapes,
    as ``ungroup`` does.
    """
    held = [_granularity(shape, dims, kind, suffix, quant_method) for suffix, shape in shapes.items()]
    return all(_divides(granularity or 1, _segments(dims, kind)) for granularity in held)


def _layout(suffix: str, quant_method: str | None) -> TensorLayout:
    if quant_method not in LAYOUTS:
        raise ValueError(f"quant_method is {quant_method!r}, expected one of {list(LAYOUTS)}; dequantize it first")
    layouts = LAYOUTS[quant_method]
    if suffix not in layouts:
        raise ValueError(
            f"parameter suffix is {suffix!r}, expected one of {list(layouts)} for quant_method {quant_method!r}; "
            f"dequantize it first"
        )
    return layouts[suffix]


def _segments(dims: GatedDeltaNetDims, kind: Kind) -> tuple[int, ...]:
    """Return the number of rows of each section within one key-head group."""
    assert dims.num_v_heads % dims.num_k_heads == 0, dims
    return tuple(size // dims.num_k_heads for size in section_sizes(dims, kind))


def _divides(granularity: int, segments: tuple[int, ...]) -> bool:
    return all(segment % granularity == 0 for segment in segments)
