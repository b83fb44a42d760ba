"""Quantized checkpoints turned into plain ones by compressed-tensors: what a server of ours is held against."""

import json
import re
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor, unpack_fp4_from_uint8, unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import (
    AutoAWQConverter,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.checkpoint.cache_scales import cache_scale

EVERY = ["re:.*"]


def dequantized(directory: Path) -> dict[str, Tensor]:
    """All weights of a one-file checkpoint, the quantized ones in float32."""
    stored = load_file(directory / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not cache_scale(name)}
    for name in [name for name in tensors if name.endswith("shared_expert.gate_up_proj.weight")]:
        gate, up = tensors.pop(name).chunk(2)
        tensors |= {name.replace("gate_up", part): rows for part, rows in (("gate", gate), ("up", up))}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    names = [name for name in tensors if name.rpartition(".")[2] in QUANTIZED]
    modules = sorted({name.rpartition(".")[0] for name in names})
    for module in modules:
        leaves = {n.removeprefix(f"{module}."): tensors.pop(n) for n in list(tensors) if n.rpartition(".")[0] == module}
        tensors[f"{module}.weight"] = _weight(method, module, leaves, config).float()
    return tensors


QUANTIZED = ("weight_scale_inv", "weight_scale", "scales")


def _weight(method: str, module: str, leaves: dict[str, Tensor], config: dict) -> Tensor:
    named = {f"m.{leaf}": tensor for leaf, tensor in leaves.items()}
    if method == "fp8":
        return FP8BlockDequantizer(targets=EVERY, dtype=torch.float32).process(named)["m.weight"]
    if method in ("gptq", "auto-round"):
        return _gptq(leaves)
    if method == "awq":
        scheme, form = preset_name_to_scheme("W4A16_ASYM", ["Linear"]), "pack-quantized"
        named = AutoAWQConverter(group_size=config["group_size"], targets=EVERY).process(named)
    elif method == "modelopt":
        named, form = ModelOptNvfp4Converter(targets=EVERY).process(named), "nvfp4-pack-quantized"
    elif method == "quark":  # the same bytes under other names
        scheme, form = preset_name_to_scheme("MXFP4", ["Linear"]), "mxfp4-pack-quantized"
        named = {"m.weight_packed": leaves["weight"], "m.weight_scale": leaves["weight_scale"]}
    else:
        schemes = [QuantizationScheme(**group) for group in config["config_groups"].values()]
        scheme = next(s for s in schemes if len(schemes) == 1 or any(re.match(t[3:], module) for t in s.targets))
        form = scheme.format or config["format"]
    state = {name.removeprefix("m."): tensor for name, tensor in named.items()}
    if form == "nvfp4-pack-quantized":  # their whole decompression rounds to bfloat16
        rows, half = state["weight_packed"].shape
        values = unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * half, dtype=torch.float32)
        return dequantize(values, state["weight_scale"].float(), global_scale=state["weight_global_scale"])
    if state["weight_scale"].dtype != torch.float8_e4m3fn:
        state["weight_scale"] = state["weight_scale"].float()  # it is in what this is that they compute
    return BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]


def _gptq(leaves: dict[str, Tensor]) -> Tensor:
    """compressed-tensors has no converter; this is AutoGPTQ's formula, ``scales * (weight - (zeros + 1))``."""
    groups, rows = leaves["scales"].shape
    bits = 32 * leaves["qzeros"].shape[1] // rows
    inputs = 32 // bits * len(leaves["qweight"])
    # Their unpacking returns signed values.
    middle = 2 ** (bits - 1)
    weight = unpack_from_int32(leaves["qweight"], bits, (inputs, rows), packed_dim=0).float() + middle
    zeros = unpack_from_int32(leaves["qzeros"], bits, (groups, rows)).float() + middle + 1
    group = leaves["g_idx"].long() if "g_idx" in leaves else torch.arange(inputs) // (inputs // groups)
    return (leaves["scales"].float()[group] * (weight - zeros[group])).T.contiguous()


def write_dequantized(source: Path, target: Path) -> Path:
    """A float32 checkpoint with the values of a quantized one."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.float().contiguous() for name, tensor in dequantized(source).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return target
