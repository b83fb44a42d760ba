"""Load checkpoints as every rank of larger groups would, in one process: ``python -m tests.engines.vllm_loading ROOT``.

For each checkpoint below ``ROOT``, with what it must hold in its dequantised form, a line of JSON says for every rank
which layers are served as stored. Exits with an assertion naming the parameter whose shard is not the expected one.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qnext_plugin.config import FULL, LINEAR, QNextConfig
from qnext_plugin.layouts import ungroup
from qnext_plugin.quantization import dequantise
from tests.dequantised import dequantised

RANKS = [(size, rank) for size in (1, 2, 4, 8) for rank in range(size)]


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
    """A loaded parameter, dequantised where the layer holds it quantised, and whether it does."""
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
    if not kind:
        if "weight_shape" in leaves:  # of the whole weight
            rows, words = leaves["weight_packed"].shape
            leaves["weight_shape"] = torch.tensor([rows, 8 * words])
        return dequantise(_by_row(leaves, layer.output_partition_sizes), quantization), True
    rows = layer.intermediate_size_per_partition
    sections = [rows, rows] if kind == "w13_" else [layer.hidden_size]
    return torch.stack(
        [dequantise(_by_row(_expert(leaves, i), sections), quantization) for i in range(layer.local_num_experts)]
    ), True


def _expert(leaves: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    mine = {name: tensor[i] for name, tensor in leaves.items() if tensor.ndim and tensor.shape[0] > i}
    if "weight_packed" in mine and mine["weight_packed"].dtype == torch.int32:  # experts are held transposed
        mine = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in mine.items()}
        words = mine["weight_packed"]
        mine["weight_shape"] = torch.tensor([words.shape[0], 8 * words.shape[1]])
    return {name: tensor for name, tensor in mine.items() if tensor.numel()}


def _by_row(leaves: dict[str, Tensor], sections: list[int]) -> dict[str, Tensor]:
    """Scales that a merged layer holds one of per section, repeated for its rows."""
    widths = torch.tensor(sections)
    return {
        name: tensor.flatten().repeat_interleave(widths)[:, None]
        if name in ("weight_scale_2", "weight_global_scale", "weight_scale") and tensor.numel() == len(sections) > 1
        else tensor
        for name, tensor in leaves.items()
    }


def checkpoints(root: Path) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    for directory in sorted(file.parent for file in root.glob("*/config.json")):
        quantization = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
        tensors = dequantised(directory) if quantization else load_file(directory / "model.safetensors")
        yield directory, tensors, quantization


def load(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> dict[str, list[str]]:
    """Check every rank's parameters, target and draft; by rank, the layers that are served as stored."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from vllm_ext.model import Qwen3NextForCausalLM
    from vllm_ext.mtp import Qwen3NextMTP

    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    mtp = {"method": "qwen3_next_mtp", "num_speculative_tokens": 1}
    vllm_config = EngineArgs(
        model=str(directory), dtype=dtype, skip_tokenizer_init=True, speculative_config=mtp
    ).create_engine_config()
    stored = list(load_file(directory / "model.safetensors").items())
    config = QNextConfig.from_pretrained(directory)
    as_stored = {}
    for tp, rank in RANKS:
        group = SimpleNamespace(world_size=tp, rank_in_group=rank, unique_name="tp", device_group=None)
        names = {}
        vllm_config.parallel_config.tensor_parallel_size = tp
        for model_class in (Qwen3NextForCausalLM, Qwen3NextMTP):
            vllm_config.compilation_config.static_forward_context.clear()
            with set_current_vllm_config(vllm_config), patch.object(parallel_state, "_TP", group):
                model = initialize_model(vllm_config, model_class=model_class)
                model.load_weights(iter(stored))
            if model_class is Qwen3NextForCausalLM:
                shards = expected(tensors, config, rank, tp)
            else:
                mtp_shards = attention_and_experts(
                    tensors, config, rank, tp, "mtp.layers.0.self_attn.", "mtp.layers.0.mlp."
                ) | {"mtp.fc.weight": tensors["mtp.fc.weight"].chunk(tp)[rank]}
                shards = {name.replace("mtp.", "model."): shard for name, shard in mtp_shards.items()}
            for name, shard in shards.items():
                where = f"{directory.name}, {model_class.__name__}: {name}, rank {rank} of {tp}"
                actual, is_quantised = weights_of(model, name, quantization)
                if is_quantised:
                    torch.testing.assert_close(actual, shard.float(), rtol=1e-6, atol=0, msg=where)
                    names[f"{model_class.__name__}.{name}"] = None
                else:
                    # NVFP4's product of two scales is rounded in another place.
                    rtol = 2**-7 if quantization.get("quant_method") == "modelopt" else 0
                    torch.testing.assert_close(actual, shard.to(actual.dtype), rtol=rtol, atol=0, msg=where)
        as_stored[f"{rank} of {tp}"] = list(names)
    return as_stored


def main(root: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{root}/rendezvous", 0, "gloo")
        initialize_model_parallel()
    # As on a CPU that has every kernel of vLLM's: what is loaded is what counts here, nothing runs.
    with patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True):
        for directory, tensors, quantization in checkpoints(Path(root)):
            # GPTQ and AWQ store scales in float16, which vLLM converts to the type it serves in.
            half = torch.float16 if quantization.get("quant_method") in ("gptq", "awq") else torch.bfloat16
            torch.set_default_dtype(half if quantization else torch.float32)
            print("loaded", json.dumps({directory.name: load(directory, tensors, quantization)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
