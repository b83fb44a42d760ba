"""What each rank of a tensor-parallel group must hold of a checkpoint, plain or quantized."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qnext_plugin.checkpoint.formats import dequantize
from qnext_plugin.checkpoint.layouts import ungroup
from qnext_plugin.checkpoint.make_quantized import IGNORE, quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantized_layers import holds_codes
from qnext_plugin.config import FULL, LINEAR, QNextConfig
from qnext_plugin.ops.cpu import packing, stored
from tests.support.cache_scales import FORM_OF_SCALES, add_cache_scales
from tests.support.dequantized import dequantized
from tests.support.packed import dequantize as of_packed

# Each FP8 block, packed word and group fits a rank of 8, but the shared expert's blocks, as in the 80B.
WIDE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_size": 256,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 512,
}
# Quantized where the published ones are not, and the other way round.
MIXED = r".*\.(shared_expert_gate|k_proj)|model\.embed_tokens|lm_head|mtp\..*\.experts\..*"
SPARE = {"linear_num_value_heads": 24, "linear_key_head_dim": 16, "linear_value_head_dim": 8}

RANKS = [(size, rank) for size in (1, 2, 4, 8) for rank in range(size)]
OUTER_RANKS = [(size, rank) for size, rank in RANKS if rank in (0, size - 1)]


def expected(tensors: dict[str, Tensor], config: QNextConfig, rank: int, tp: int) -> dict[str, Tensor]:
    """This rank's weights of the first linear and the first full attention layer, and of the former's experts."""
    linear, full = (f"model.layers.{config.layer_types.index(kind)}." for kind in (LINEAR, FULL))
    return linear_attention(tensors, config, rank, tp, f"{linear}linear_attn.") | attention_and_experts(
        tensors, config, rank, tp, f"{full}self_attn.", f"{linear}mlp."
    )


def linear_attention(
    tensors: dict[str, Tensor], config: QNextConfig, rank: int, tp: int, prefix: str
) -> dict[str, Tensor]:
    local = config.gdn.shard(tp)

    def rows(name: str) -> Tensor:
        return tensors[prefix + name].chunk(tp)[rank]

    # A rank holds whole key-head groups, which the checkpoint stores one after another.
    q, k, v = tensors[f"{prefix}conv1d.weight"].split([config.gdn.key_dim] * 2 + [config.gdn.value_dim])
    return {
        f"{prefix}in_proj_qkvz.weight": ungroup(rows("in_proj_qkvz.weight"), local, "qkvz", "weight"),
        f"{prefix}in_proj_ba.weight": ungroup(rows("in_proj_ba.weight"), local, "ba", "weight"),
        f"{prefix}conv1d.weight": torch.cat([x.chunk(tp)[rank] for x in (q, k, v)]),
        f"{prefix}A_log": rows("A_log"),
        f"{prefix}dt_bias": rows("dt_bias"),
        f"{prefix}out_proj.weight": tensors[f"{prefix}out_proj.weight"].chunk(tp, dim=1)[rank],
    }


def attention_and_experts(
    tensors: dict[str, Tensor], config: QNextConfig, rank: int, tp: int, attention: str, mlp: str
) -> dict[str, Tensor]:
    def rows(name: str) -> Tensor:
        return tensors[name].chunk(tp)[rank]

    def columns(name: str) -> Tensor:
        return tensors[name].chunk(tp, dim=1)[rank]

    def kv(name: str) -> Tensor:
        heads = tensors[name].chunk(config.num_key_value_heads)
        mine = max(1, config.num_key_value_heads // tp)
        first = rank * config.num_key_value_heads // tp
        return torch.cat(heads[first : first + mine])

    def gate_up(prefix: str) -> Tensor:
        return torch.cat([rows(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")])

    experts = [f"{mlp}experts.{i}" for i in range(config.num_experts)]
    return {
        f"{attention}qkv_proj.weight": torch.cat(
            [rows(f"{attention}q_proj.weight"), kv(f"{attention}k_proj.weight"), kv(f"{attention}v_proj.weight")]
        ),
        f"{attention}o_proj.weight": columns(f"{attention}o_proj.weight"),
        f"{mlp}gate.weight": tensors[f"{mlp}gate.weight"],
        f"{mlp}shared_expert.gate_up_proj.weight": gate_up(f"{mlp}shared_expert"),
        f"{mlp}shared_expert.down_proj.weight": columns(f"{mlp}shared_expert.down_proj.weight"),
        f"{mlp}experts.routed_experts.w13_weight": torch.stack([gate_up(expert) for expert in experts]),
        f"{mlp}experts.routed_experts.w2_weight": torch.stack([columns(f"{e}.down_proj.weight") for e in experts]),
    }


def weights_of(model: nn.Module, name: str, quantization: dict[str, Any]) -> tuple[Tensor, bool]:
    """A loaded parameter, dequantized where the layer holds it quantized, and whether it does."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    held = dict(layer.named_parameters(recurse=False))
    if not leaf.endswith("weight"):
        return held[leaf].data, False
    kind = leaf.removesuffix("weight")  # "w13_", "w2_" or nothing
    leaves = {n.removeprefix(kind): p.data for n, p in held.items() if n.startswith(kind)}
    plain = leaves.get("weight")
    if plain is not None and plain.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return plain, False
    if holds_codes(layer):
        codes = layer.quant_method.codes[kind.removesuffix("_")]
        for weight in getattr(layer.quant_method, "weights", ()):  # SGLang's are packed by now
            if weight.codes is codes and weight.params["weight"] is held[f"{kind}weight"]:
                form = packing.Form(*weight.form)
                return of_packed(form, weight.params["weight"].data, weight.rows), True
        return of_packed(*stored.pack(codes, leaves), leaves["weight"].shape[-2]), True
    if not kind:
        if "weight_shape" in leaves:  # of the whole weight
            rows, words = leaves["weight_packed"].shape
            leaves["weight_shape"] = torch.tensor([rows, 8 * words])
        return dequantize(_by_row(leaves, getattr(layer, "output_partition_sizes", [])), quantization), True
    rows = layer.intermediate_size_per_partition
    sections = [rows, rows] if kind == "w13_" else [layer.hidden_size]
    return torch.stack(
        [
            dequantize(_by_row(_expert(leaves, i, quantization), sections), quantization)
            for i in range(len(next(iter(leaves.values()))))
        ]
    ), True


def _expert(leaves: dict[str, Tensor], i: int, quantization: dict[str, Any]) -> dict[str, Tensor]:
    mine = {name: tensor[i] for name, tensor in leaves.items() if tensor.ndim and tensor.shape[0] > i}
    if "weight_packed" in mine and mine["weight_packed"].dtype == torch.int32:  # experts are held transposed
        mine = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in mine.items()}
        words = mine["weight_packed"]
        mine["weight_shape"] = torch.tensor([words.shape[0], 8 * words.shape[1]])
        if not any(group["weights"].get("actorder") for group in quantization["config_groups"].values()):
            mine.pop("weight_g_idx", None)  # SGLang allocates it and uses it with an order of activations only
    if "qzeros" in mine and mine["qzeros"].dtype != torch.int32:  # SGLang knows those of symmetric weights
        (groups, rows), bits = mine["scales"].shape, quantization["bits"]
        middle = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
        mine["qzeros"] = torch.full((groups, rows * bits // 32), middle, dtype=torch.int32)
    return {name: tensor for name, tensor in mine.items() if tensor.numel()}


def _by_row(leaves: dict[str, Tensor], sections: list[int]) -> dict[str, Tensor]:
    """Scales that a merged layer holds one of per section, repeated for its rows."""
    widths = torch.tensor(sections)
    if "g_idx" in leaves:  # numbers of the whole weight's groups
        leaves = leaves | {"g_idx": leaves["g_idx"] - leaves["g_idx"].min()}
    return {
        name: tensor.flatten().repeat_interleave(widths)[:, None]
        if name in ("weight_scale_2", "weight_global_scale", "weight_scale") and tensor.numel() == len(sections) > 1
        else tensor
        for name, tensor in leaves.items()
    }


def checkpoints(root: Path) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    for directory in sorted(file.parent for file in root.glob("*/config.json")):
        quantization = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
        tensors = dequantized(directory) if quantization else load_file(directory / "model.safetensors")
        yield directory, tensors, quantization


def make(root: Path, names: Iterable[str]) -> None:
    """Write a plain checkpoint and quantized ones, each also with other modules quantized."""
    write_random_checkpoint(root / "source" / "wide", overrides=WIDE)
    for name in names:
        if name == "plain":
            narrow = WIDE | SPARE | {"moe_intermediate_size": 64}
            write_random_checkpoint(root / "plain", dtype="float32", overrides=narrow)
            continue
        quantize_checkpoint(root / "source" / "wide", root / name, format=name, ignore=IGNORE)
        quantize_checkpoint(root / "source" / "wide", root / f"{name}-mixed", format=name, ignore=MIXED)
        file = root / f"{name}-mixed" / "config.json"
        raw = json.loads(file.read_text())
        for key in ("ignore", "modules_to_not_convert"):
            if key in raw["quantization_config"]:
                raw["quantization_config"][key] = ["model.layers.0.self_attn", "re:nothing.like.this"]
        raw["quantization_config"].pop("dynamic", None)
        file.write_text(json.dumps(raw))
        for directory in (root / name, root / f"{name}-mixed"):
            add_cache_scales(directory, FORM_OF_SCALES[name])


def make_auto_round(root: Path) -> None:
    """The GPTQ checkpoint as AutoRound describes it: its quantization holds for the model's layers, not the draft's."""
    shutil.copytree(root / "gptq", root / "auto-round")
    raw = json.loads((root / "auto-round" / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": 4,
        "group_size": raw["quantization_config"]["group_size"],
        "sym": True,
        "block_name_to_quantize": "model.layers",
    }
    (root / "auto-round" / "config.json").write_text(json.dumps(raw))
