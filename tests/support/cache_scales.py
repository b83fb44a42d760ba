"""Scales for an FP8 cache, added to a checkpoint as each quantizer stores them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Names in ``self_attn`` of the scales of queries (where they are stored), keys and values.
NAMES = {
    "modelopt": {"k": "k_proj.k_scale", "v": "v_proj.v_scale"},
    "compressed-tensors": {x: f"{x}_scale" for x in "qkv"},
    "quark": {x: f"{x}_proj.output_scale" for x in "qkv"},
    "engine": {x: f"attn.{x}_scale" for x in "kv"},
}
# What asks the engines for the cache; the others leave it to a flag.
SETTINGS: dict[str, dict[str, Any]] = {
    "modelopt": {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    "compressed-tensors": {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    },
}
FORM_OF_SCALES = {
    "fp8-block": "quark",
    "fp8-channel": "compressed-tensors",
    "w8a8": "compressed-tensors",
    "w4a16": "engine",
    "awq": "quark",
    "gptq": "engine",
    "gptq-int8": "engine",
    "mxfp8": "compressed-tensors",
    "mxfp4": "compressed-tensors",
    "nvfp4-llm-compressor": "compressed-tensors",
    "mxfp4-quark": "quark",
    "nvfp4": "modelopt",
    "auto-round-mixed": "engine",
    "two-groups": "compressed-tensors",
}


def scale(layer: str, x: str) -> float:
    """The scale of ``x``, another one in each layer, exact in bfloat16."""
    number = int(layer.split(".")[-2]) + 4 * layer.startswith("mtp.")
    return (1 + number / 8) * {"q": 0.25, "k": 0.5, "v": 2.0}[x]


def add_cache_scales(directory: Path, form: str, *, asks: bool = True) -> None:
    """Add scales to each attention layer of a one-file checkpoint, the draft's included; it ``asks`` for the cache."""
    tensors = load_file(directory / "model.safetensors")
    layers = {name.partition(".q_norm")[0] for name in tensors if name.endswith(".self_attn.q_norm.weight")}
    for layer in layers:
        for x, name in NAMES[form].items():
            value = scale(layer, x)
            stored = torch.tensor(value) if form == "modelopt" else torch.tensor([value], dtype=torch.bfloat16)
            tensors[f"{layer}.{name}"] = stored
            if form == "compressed-tensors":
                tensors[f"{layer}.{x}_zero_point"] = torch.zeros(1, dtype=torch.float8_e4m3fn)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= SETTINGS.get(form, {}) if asks else {}
    file.write_text(json.dumps(raw))
