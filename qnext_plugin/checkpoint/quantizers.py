"""The published formats as their quantizers write them: a weight's stored tensors, and the ``quantization_config``.

Numbers are rounded to nearest; compressed-tensors packs them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from qnext_plugin.checkpoint.dequantization import AWQ_ORDER

FP8_BLOCK = [128, 128]
_LARGEST_INPUT = 12.0  # assumed for NVFP4's static input scale: a normalized hidden state rarely exceeds it
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A stored format and the functions that write it.

    ``leaves`` turns a weight ``[rows, in]`` into the stored tensors, and ``config`` makes the ``quantization_config``.
    Both take the scheme; ``config`` also takes the names of the modules that stay unquantized. ``name`` is the key
    in ``formats.FORMATS``, by which the format is read.
    """

    name: str
    scheme: Callable[[int], QuantizationScheme]
    leaves: Callable[[Tensor, QuantizationScheme], Leaves]
    config: Callable[[QuantizationScheme, list[str]], dict[str, Any]]


def _parameters(weight: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return scales in ``dtype``, zero points and, for NVFP4, the global scale, from the range of each block."""
    rows, columns = weight.shape
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).movedim(1, 2).flatten(2)
    else:
        blocks = weight.unflatten(1, (-1, args.group_size or columns))
    low, high = blocks.amin(-1), blocks.amax(-1)
    whole = generate_gparam(low.amin(), high.amax()) if args.strategy == "tensor_group" else None
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    return scale.to(dtype), zero_point, whole


def _compressed(compression: str) -> Callable[[Tensor, QuantizationScheme], Leaves]:
    def leaves(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
        dtype = weight.dtype
        scale, zero_point, whole = _parameters(weight.float(), scheme.weights, dtype)
        if whole is not None:
            scale = scale.float()
        state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero_point}
        state |= {} if whole is None else {"weight_global_scale": whole}
        return dict(BaseCompressor.get_value_from_registry(compression).compress(state, scheme))

    return leaves


def _compressed_config(compression: str) -> Callable[[QuantizationScheme, list[str]], dict[str, Any]]:
    def config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
        made = QuantizationConfig(
            config_groups={"group_0": scheme}, format=compression, ignore=ignored, quantization_status="compressed"
        )
        return json.loads(made.model_dump_json())

    return config


def _fp8_block(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
    scale, zero_point, _ = _parameters(weight.float(), scheme.weights, torch.bfloat16)
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % FP8_BLOCK[1], 0, -rows % FP8_BLOCK[0]))
    values = quantize(padded, scale.float(), zero_point, scheme.weights, dtype=torch.float8_e4m3fn)
    return {"weight": values[:rows, :columns], "weight_scale_inv": scale}


def _fp8_block_config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": FP8_BLOCK,
        "modules_to_not_convert": ignored,
    }


def _integers(weight: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 values ``[in, rows]``, and float16 scales and int8 zero points ``[in / group, rows]``."""
    scale, zero_point, _ = _parameters(weight.float(), scheme.weights, torch.float16)
    values = quantize(weight.float(), scale.float(), zero_point, scheme.weights, dtype=torch.int8)
    return values.T, scale.T, zero_point.to(torch.int8).T


def _gptq(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
    values, scales, zeros = _integers(weight, scheme)
    groups = torch.arange(len(values), dtype=torch.int32) // scheme.weights.group_size
    return {
        "qweight": pack_to_int32(values.contiguous(), scheme.weights.num_bits, packed_dim=0),
        "scales": scales,
        # The format stores each zero point minus one.
        "qzeros": pack_to_int32((zeros - 1).contiguous(), scheme.weights.num_bits),
        "g_idx": groups,
    }


def _gptq_config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": scheme.weights.num_bits,
        "group_size": scheme.weights.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"-:{re.escape(module)}$": {} for module in ignored},
    }


def _awq(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
    values, scales, zeros = _integers(weight, scheme)
    order = torch.tensor(AWQ_ORDER).argsort()

    def packed(columns: Tensor) -> Tensor:
        return pack_to_int32(columns.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": packed(values), "scales": scales, "qzeros": packed(zeros)}


def _awq_config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.weights.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored,
    }


def _nvfp4(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
    stored = _compressed("nvfp4-pack-quantized")(weight, scheme)
    return {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": stored["weight_global_scale"].reciprocal().squeeze(),
        "input_scale": torch.tensor(_LARGEST_INPUT / (6.0 * 448.0)),
    }


def _nvfp4_config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
    args = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt"},
        "config_groups": {"group_0": {"weights": args, "input_activations": args, "targets": ["Linear"]}},
        "ignore": ignored,
    }


def _quark_mxfp4(weight: Tensor, scheme: QuantizationScheme) -> Leaves:
    stored = _compressed("mxfp4-pack-quantized")(weight, scheme)
    return {"weight": stored["weight_packed"], "weight_scale": stored["weight_scale"]}


def _quark_mxfp4_config(scheme: QuantizationScheme, ignored: list[str]) -> dict[str, Any]:
    args = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
    inputs = {**args, "is_dynamic": True}
    return {
        "quant_method": "quark",
        "global_quant_config": {
            **{"weight": {**args, "is_dynamic": False}, "input_tensors": inputs, "output_tensors": None, "bias": None}
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ignored,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }


def _weights(**args: Any) -> Callable[[int], QuantizationScheme]:
    return lambda group_size: QuantizationScheme(
        targets=["Linear"], weights={k: group_size if v == "group_size" else v for k, v in args.items()}
    )


def _preset(name: str) -> Callable[[int], QuantizationScheme]:
    return lambda _: preset_name_to_scheme(name, ["Linear"])


def _by_preset(name: str, preset: str, compression: str) -> Format:
    return Format(name, _preset(preset), _compressed(compression), _compressed_config(compression))


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": "group_size"}
FORMATS: Mapping[str, Format] = {
    "fp8-block": Format(
        "fp8",
        _weights(num_bits=8, type="float", strategy="block", block_structure=FP8_BLOCK),
        _fp8_block,
        _fp8_block_config,
    ),
    "fp8-channel": _by_preset("fp8", "FP8_DYNAMIC", "float-quantized"),
    "w8a8": _by_preset("int8", "W8A8", "int-quantized"),
    "w4a16": Format("packed", _weights(**_INT4), _compressed("pack-quantized"), _compressed_config("pack-quantized")),
    "mxfp8": _by_preset("mxfp8", "MXFP8", "mxfp8-quantized"),
    "mxfp4": _by_preset("mxfp4", "MXFP4", "mxfp4-pack-quantized"),
    "nvfp4-llm-compressor": _by_preset("nvfp4", "NVFP4", "nvfp4-pack-quantized"),
    "awq": Format("awq", _weights(**_INT4, symmetric=False), _awq, _awq_config),
    "gptq": Format("gptq", _weights(**_INT4), _gptq, _gptq_config),
    "gptq-int8": Format("gptq", _weights(**_INT4 | {"num_bits": 8}), _gptq, _gptq_config),
    "nvfp4": Format("nvfp4", _preset("NVFP4"), _nvfp4, _nvfp4_config),
    "mxfp4-quark": Format("mxfp4", _preset("MXFP4"), _quark_mxfp4, _quark_mxfp4_config),
}
