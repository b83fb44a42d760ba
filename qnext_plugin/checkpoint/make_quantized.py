"""Make quantized test checkpoints in the published formats, rounded to nearest and packed by compressed-tensors.

No calibration data is read, so the accuracy is that of plain rounding. The checkpoints serve to test that a server
reads each format correctly; for that the values do not matter.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.checkpoint.formats import AWQ_ORDER
from qnext_plugin.checkpoint.headers import INDEX_FILE, Shape, read_headers
from qnext_plugin.checkpoint.quantization import check_quantization
from qnext_plugin.checkpoint.schema import check_coverage, expected_tensors
from qnext_plugin.config import QNextConfig

# A pattern for the whole names of the modules that the published checkpoints do not quantize.
IGNORE = r".*\.(embed_tokens|conv1d|in_proj_ba|gate|shared_expert_gate)|lm_head|mtp\.fc"
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


class Quantization:
    """Which modules of a checkpoint are stored in a format, and how.

    ``shapes`` are those of the unquantized checkpoint's tensors by name. ``format``, ``group_size`` and ``ignore`` are
    those of ``quantize_checkpoint``. Raises ``ValueError`` for an unknown format, and if the group size does not divide
    a module's inputs.
    """

    def __init__(self, shapes: Mapping[str, Shape], format: str, group_size: int = 32, ignore: str = IGNORE) -> None:
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        self._format, self._scheme = FORMATS[format], FORMATS[format].scheme(group_size)
        linear = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        ignored = {module for module in linear if re.fullmatch(ignore, module)}
        self._chosen = {module: shape for module, shape in linear.items() if module not in ignored}
        self._ignored = sorted(ignored)
        size = self._scheme.weights.group_size or 1
        odd = [f"{module} {list(shape)}" for module, shape in sorted(self._chosen.items()) if shape[1] % size]
        if odd:
            raise ValueError(
                f"group size {size} does not divide the inputs of {odd[0]} and {len(odd) - 1} more modules"
            )

    def config(self) -> dict[str, Any]:
        """Return the ``quantization_config``."""
        return self._format.config(self._scheme, self._ignored)

    def stored(self, name: str, weight: Tensor) -> Leaves:
        """Return the tensors that store a weight, by name; only the weight itself where its module is not quantized."""
        module = name.removesuffix(".weight")
        if module not in self._chosen:
            return {name: weight}
        leaves = self._format.leaves(weight, self._scheme)
        return {f"{module}.{leaf}": value.contiguous() for leaf, value in leaves.items()}

    def layout(self, dtype: torch.dtype) -> dict[str, Leaves]:
        """Return, for each quantized weight of ``dtype``, the tensors of ``stored`` without data."""

        @cache
        def leaves(shape: Shape) -> Leaves:
            # What a weight is stored as depends on its shape alone.
            made = self._format.leaves(torch.randn(shape, dtype=dtype), self._scheme)
            return {leaf: value.to("meta") for leaf, value in made.items()}

        return {
            f"{module}.weight": {f"{module}.{leaf}": value for leaf, value in leaves(shape).items()}
            for module, shape in self._chosen.items()
        }


def quantize_checkpoint(
    source: str | Path, target: str | Path, *, format: str, group_size: int = 32, ignore: str = IGNORE
) -> None:
    """Write ``source``, an unquantized local checkpoint, to the new directory ``target`` in ``format``.

    ``format`` is one of ``FORMATS``. ``group_size`` applies to formats with groups of inputs. ``ignore`` is a pattern
    for the whole names of modules that stay unquantized. One file of the source is in memory at a time. Raises
    ``ValueError`` for an unknown format, for a source that is incomplete or already quantized, and if the group size
    does not divide a module's inputs.
    """
    source, target = Path(source), Path(target)
    config, headers = QNextConfig.from_pretrained(source), read_headers(source)
    check_coverage(config, headers)
    raw = json.loads((source / "config.json").read_text())
    if "quantization_config" in raw:
        raise ValueError(f"{source}: has a quantization_config already; start from the unquantized checkpoint")
    check_quantization(headers, None, {})
    shapes = {name: headers[name].shape for name in expected_tensors(config) if name in headers}
    quantization = Quantization(shapes, format, group_size, ignore)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: expected an empty or new directory; choose another or delete it")
    target.mkdir(parents=True, exist_ok=True)

    weight_map: dict[str, str] = {}
    for file in sorted({info.file for info in headers.values()}):
        out: Leaves = {}
        for name, tensor in load_file(file).items():
            out |= quantization.stored(name, tensor)
        save_file(out, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(out, file.name)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX_FILE and file.is_file():
            shutil.copy(file, target)
    if (source / INDEX_FILE).exists():
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    raw["quantization_config"] = quantization.config()
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


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
