"""Load a checkpoint as every rank of larger groups would, in one process: ``python -m tests.engines.vllm_loading DIR``.

Exits with an assertion naming the parameter whose shard is not the one expected from the checkpoint's own rows.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from qnext_plugin.config import QNextConfig
from qnext_plugin.layouts import ungroup


def expected(tensors: dict[str, Tensor], config: QNextConfig, rank: int, tp: int) -> dict[str, Tensor]:
    """This rank's parameters of layers 0 (linear attention) and 3 (full attention)."""
    linear, full, mlp = "model.layers.0.linear_attn.", "model.layers.3.self_attn.", "model.layers.0.mlp."
    local = config.gdn.shard(tp)

    def rows(name: str) -> Tensor:
        return tensors[name].chunk(tp)[rank]

    def columns(name: str) -> Tensor:
        return tensors[name].chunk(tp, dim=1)[rank]

    def kv(name: str) -> Tensor:
        heads = tensors[name].chunk(config.num_key_value_heads)
        mine = max(1, config.num_key_value_heads // tp)
        first = rank * config.num_key_value_heads // tp
        return torch.cat(heads[first : first + mine])

    # A rank holds whole key-head groups, which the checkpoint stores one after another.
    q, k, v = tensors[linear + "conv1d.weight"].split([config.gdn.key_dim] * 2 + [config.gdn.value_dim])
    shards = {
        linear + "in_proj_qkvz.weight": ungroup(rows(linear + "in_proj_qkvz.weight"), local, "qkvz", "weight"),
        linear + "in_proj_ba.weight": ungroup(rows(linear + "in_proj_ba.weight"), local, "ba", "weight"),
        linear + "conv1d.weight": torch.cat([x.chunk(tp)[rank] for x in (q, k, v)]),
        linear + "A_log": rows(linear + "A_log"),
        linear + "dt_bias": rows(linear + "dt_bias"),
        linear + "out_proj.weight": columns(linear + "out_proj.weight"),
        full + "qkv_proj.weight": torch.cat(
            [rows(full + "q_proj.weight"), kv(full + "k_proj.weight"), kv(full + "v_proj.weight")]
        ),
        full + "o_proj.weight": columns(full + "o_proj.weight"),
        mlp + "shared_expert.down_proj.weight": columns(mlp + "shared_expert.down_proj.weight"),
    }
    gate_up = [
        torch.cat([rows(f"{mlp}experts.{i}.{name}_proj.weight") for name in ("gate", "up")])
        for i in range(config.num_experts)
    ]
    down = [columns(f"{mlp}experts.{i}.down_proj.weight") for i in range(config.num_experts)]
    experts = f"{mlp}experts.routed_experts."
    return shards | {experts + "w13_weight": torch.stack(gate_up), experts + "w2_weight": torch.stack(down)}


def main(directory: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ext.model import Qwen3NextForCausalLM

    vllm_config = EngineArgs(model=directory, dtype="float32", skip_tokenizer_init=True).create_engine_config()
    tensors = load_file(Path(directory) / "model.safetensors")
    config = QNextConfig.from_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
        initialize_model_parallel()
    for tp, rank in [(size, rank) for size in (1, 2, 4, 8) for rank in range(size)]:
        vllm_config.parallel_config.tensor_parallel_size = tp
        vllm_config.compilation_config.static_forward_context.clear()
        group = SimpleNamespace(world_size=tp, rank_in_group=rank, unique_name="tp", device_group=None)
        with set_current_vllm_config(vllm_config), patch.object(parallel_state, "_TP", group):
            model = Qwen3NextForCausalLM(vllm_config=vllm_config)
            for _ in range(2):  # a reload gives the same
                model.load_weights(iter(tensors.items()))
        parameters = dict(model.named_parameters())
        for name, shard in expected(tensors, config, rank, tp).items():
            assert torch.equal(parameters[name], shard), f"{name}, rank {rank} of {tp}"
        print(f"rank {rank} of {tp}: loaded as expected", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
