"""LoRA adapters in the files that PEFT writes, and checkpoints with one merged: what a server of ours is held to."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    directory: Path, model: Path, modules: str, rank: int, alpha: float, seed: int = 0, **config: Any
) -> Path:
    """Adapt every matrix of ``model`` whose module ``modules`` matches (a regular expression), with random weights.

    ``config`` are further keys of ``adapter_config.json``, and ``rank_pattern`` among them is followed.
    """
    with safe_open(model / "model.safetensors", framework="pt") as file:
        shapes = {n.removesuffix(".weight"): file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, shape in shapes.items():
        if len(shape) == 2 and re.fullmatch(modules, module):
            r = config.get("rank_pattern", {}).get(module.rpartition(".")[2], rank)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[f"{PREFIX}{module}.lora_B.weight"] = 0.2 * torch.randn(shape[0], r, generator=generator)
    assert tensors, modules
    targets = sorted({name.split(".")[-3] for name in tensors})
    save(directory, tensors, {"r": rank, "lora_alpha": alpha, "target_modules": targets} | config)
    return directory


def save(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    common = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False}
    (directory / "adapter_config.json").write_text(json.dumps(common | config))


def write_merged(target: Path, model: Path, adapter: Path) -> Path:
    """A checkpoint with ``weight + scale * lora_B @ lora_A`` in the place of each adapted weight."""
    shutil.copytree(model, target)
    weights = load_file(model / "model.safetensors")
    for name, delta in added(adapter).items():
        weights[name] += delta
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def added(adapter: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight, by the weight's name."""
    config, pairs = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / WEIGHTS)
    deltas = {}
    for name, b in pairs.items():
        if name.endswith(".lora_B.weight"):
            rank = b.shape[1]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            deltas[f"{module}.weight"] = scale * b @ pairs[name.replace("lora_B", "lora_A")]
    return deltas
