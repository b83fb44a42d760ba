"""The stored formats of quantized modules: how each is recognized and checked; ``dequantization`` decodes them.

A format is recognized by the names and dtypes of a module's tensors, module by module, because configurations describe
modules in lists that often do not fit. Each quantizer names its tensors as follows (``rows`` are outputs, ``in`` are
inputs; a group of inputs shares a scale):

    fp8                 weight float8 [rows, in]          weight_scale_inv per 128x128 block, or weight_scale
    compressed-tensors  weight float8 or int8 [rows, in]  weight_scale per tensor, row, group or block
                        weight_packed int32 [rows, in/8]  weight_scale, weight_zero_point int32 [rows/8, groups]
                        weight_packed uint8 [rows, in/2]  weight_scale float8, weight_global_scale (divides)
    modelopt            weight uint8 [rows, in/2]         weight_scale float8, weight_scale_2 (multiplies)
    gptq                qweight int32 [in/8, rows]        scales [groups, rows], qzeros int32 [groups, rows/8], g_idx
    awq                 qweight int32 [in, rows/8]        scales [groups, rows], qzeros int32 [groups, rows/8]
    quark               as modelopt or compressed-tensors, with packed bytes in ``weight``

A scale stored as uint8 or float8_e8m0 (the MX formats) is an exponent, ``2 ** (scale - 127)``. ``quantizers.py`` writes
each format.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from qnext_plugin.checkpoint.dequantization import (
    Stored,
    dequantize_awq,
    dequantize_bytes,
    dequantize_fp4,
    dequantize_gptq,
    dequantize_words,
    scale_name,
)
from qnext_plugin.checkpoint.headers import Shape, TensorInfo, describe
from qnext_plugin.checkpoint.layouts import FP8_BLOCK
from qnext_plugin.checkpoint.schema import FLOAT_DTYPES

_EXPONENTS = ("U8", "F8_E8M0")
_SCALES = ("weight_scale_inv", "weight_scale")

Leaves = Mapping[str, TensorInfo]
Decoder = Callable[[Stored, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Format:
    """A stored format.

    ``decode`` takes a module's tensors and the ``quantization_config``, and returns the float32 weight ``[rows, in]``.
    ``dtypes`` has every tensor that a module may have, with its possible dtypes. ``shapes`` takes a module's headers,
    its rows and its inputs, and yields the tensors that it must have, each with its possible shapes. ``in_words``
    says that several integers are packed into an int32.
    """

    decode: Decoder
    shapes: Callable[[Leaves, int, int], Iterator[tuple[str, list[Shape]]]]
    dtypes: Mapping[str, tuple[str, ...]]
    in_words: bool = False


def stored_format(leaves: Leaves) -> str:
    """Return the key in ``FORMATS`` for a quantized module. ``leaves`` are its tensors by the names' last segment.

    Raises ``ValueError`` if no known format has such a weight.
    """
    if "qweight" in leaves:
        by_inputs = "scales" in leaves and leaves["qweight"].shape[-1:] == leaves["scales"].shape[-1:]
        return "gptq" if by_inputs else "awq"
    name = "weight" if "weight" in leaves else "weight_packed"
    scale = leaves[scale_name(leaves)].dtype if scale_name(leaves) in leaves else None
    dtype = leaves[name].dtype
    formats = {"F8_E4M3": "mxfp8" if scale in _EXPONENTS else "fp8", "I8": "int8"}
    formats = (formats if name == "weight" else {"I32": "packed"}) | {"U8": "nvfp4" if scale == "F8_E4M3" else "mxfp4"}
    if dtype not in formats:
        raise ValueError(f"{name} is {dtype}, which no known format has")
    return formats[dtype]


def problem(leaves: Leaves, shape: Shape) -> str | None:
    """Return why a quantized module, whose weight has ``shape``, cannot be read from its stored tensors, or None."""
    try:
        name = stored_format(leaves)
        stored = FORMATS[name]
        for leaf, info in leaves.items():
            if leaf not in stored.dtypes:
                return f"{leaf} does not belong to {name}"
            if info.dtype not in stored.dtypes[leaf]:
                return f"{leaf} is {info.dtype}, expected {' or '.join(stored.dtypes[leaf])}"
        for leaf, expected in stored.shapes(leaves, *shape):
            if leaves[leaf].shape not in expected:
                allowed = " or ".join(str(list(possible)) for possible in expected) or "whole groups and words"
                return f"{leaf} is {list(leaves[leaf].shape)} for a weight of {list(shape)}, expected {allowed}"
    except ValueError as e:
        return str(e)
    except KeyError as e:
        return f"{e.args[0]} is missing"
    except IndexError:
        return f"{', '.join(leaves)} have too few dimensions"
    return None


def _grouped(rows: int, columns: int, size: int) -> list[Shape]:
    return [] if columns % size else [(rows, columns // size)]


def _scale_shapes(scale: Shape, rows: int, columns: int) -> list[Shape]:
    """Return the shapes that a scale per tensor, row, group of inputs or 128x128 block may have."""
    high, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    groups = scale[1] if len(scale) == 2 and scale[0] == rows and scale[1] and columns % scale[1] == 0 else 1
    return [(), (1,), (1, 1), (rows,), (rows, groups), (high, wide), (high, 1, wide, 1)]


def _byte_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "weight", [(rows, columns)]
    name = scale_name(leaves)
    yield name, _scale_shapes(leaves[name].shape, rows, columns)
    if "weight_zero_point" in leaves:
        yield "weight_zero_point", [leaves[name].shape]


def _mxfp8_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "weight", [(rows, columns)]
    yield scale_name(leaves), _grouped(rows, columns, 32)


def _mxfp4_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "weight" if "weight" in leaves else "weight_packed", _grouped(rows, columns, 2)
    yield "weight_scale", _grouped(rows, columns, 32)


def _nvfp4_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "weight" if "weight" in leaves else "weight_packed", _grouped(rows, columns, 2)
    yield "weight_scale", _grouped(rows, columns, 16)
    yield "weight_scale_2" if "weight_scale_2" in leaves else "weight_global_scale", [(), (1,)]


def _packed_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    words = {-(-columns * bits // 32): bits for bits in (4, 8)}
    yield "weight_packed", [(rows, count) for count in words]
    yield "weight_shape", [(2,)]
    scale = leaves["weight_scale"].shape
    yield "weight_scale", _scale_shapes(scale, rows, columns)
    if "weight_zero_point" in leaves:
        packed = leaves["weight_zero_point"].dtype == "I32"
        entries = -(-rows * words[leaves["weight_packed"].shape[1]] // 32)
        yield "weight_zero_point", [(entries, scale[1])] if packed else [scale]
    if "weight_g_idx" in leaves:
        yield "weight_g_idx", [(columns,)]


def _gptq_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "qweight", [(columns * bits // 32, rows) for bits in (2, 4, 8)]
    groups, bits = leaves["scales"].shape[0], 32 * leaves["qweight"].shape[0] // columns
    yield "scales", [(groups, rows)] if "g_idx" in leaves or columns % max(groups, 1) == 0 else []
    yield "qzeros", [] if rows * bits % 32 else [(groups, rows * bits // 32)]
    if "g_idx" in leaves:
        yield "g_idx", [(columns,)]


def _awq_shapes(leaves: Leaves, rows: int, columns: int) -> Iterator[tuple[str, list[Shape]]]:
    yield "qweight", [] if rows % 8 else [(columns, rows // 8)]
    groups = leaves["scales"].shape[0]
    yield "scales", [] if columns % max(groups, 1) else [(groups, rows)]
    yield "qzeros", [(groups, rows // 8)]


def dequantize(tensors: Stored, quantization_config: Mapping[str, Any]) -> Tensor:
    """Compute a module's weight, float32 ``[rows, in]``, from its stored tensors by the names' last segment."""
    name = stored_format({leaf: describe(tensor) for leaf, tensor in tensors.items()})
    return FORMATS[name].decode(tensors, quantization_config)


_INPUTS = {"input_scale": FLOAT_DTYPES, "input_global_scale": FLOAT_DTYPES, "input_zero_point": ("I8", "F8_E4M3")}
_BYTES = _INPUTS | dict.fromkeys(_SCALES, FLOAT_DTYPES)
_FP4 = _INPUTS | {"weight": ("U8",), "weight_packed": ("U8",)}
_WORDS = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOAT_DTYPES, "g_idx": ("I32",)}
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "fp8": Format(
            dequantize_bytes,
            _byte_shapes,
            _BYTES | {"weight": ("F8_E4M3",), "weight_zero_point": ("F8_E4M3", *FLOAT_DTYPES)},
        ),
        "int8": Format(dequantize_bytes, _byte_shapes, _BYTES | {"weight": ("I8",), "weight_zero_point": ("I8",)}),
        "mxfp8": Format(
            dequantize_bytes, _mxfp8_shapes, _INPUTS | dict.fromkeys(_SCALES, _EXPONENTS) | {"weight": ("F8_E4M3",)}
        ),
        "mxfp4": Format(dequantize_fp4, _mxfp4_shapes, _FP4 | {"weight_scale": _EXPONENTS}),
        "nvfp4": Format(
            dequantize_fp4,
            _nvfp4_shapes,
            {
                **_FP4,
                **{"weight_scale": ("F8_E4M3",), "weight_global_scale": FLOAT_DTYPES, "weight_scale_2": FLOAT_DTYPES},
            },
        ),
        "packed": Format(
            dequantize_words,
            _packed_shapes,
            {
                **_INPUTS,
                **{"weight_packed": ("I32",), "weight_shape": ("I64", "I32"), "weight_scale": FLOAT_DTYPES},
                **{"weight_zero_point": ("I32", "I8"), "weight_g_idx": ("I32",)},
            },
            in_words=True,
        ),
        "gptq": Format(dequantize_gptq, _gptq_shapes, _WORDS, in_words=True),
        "awq": Format(dequantize_awq, _awq_shapes, _WORDS, in_words=True),
    }
)
