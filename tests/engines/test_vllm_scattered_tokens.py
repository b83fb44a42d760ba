"""The layers with each rank's share of the tokens, as with tensor, data and expert parallelism: two ranks over gloo."""

import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.only("vllm")

RANKS, HIDDEN = 2, 8
TOKENS = (1, 2, 3, 5, 8)
COLLECTIVES = ("tensor_model_parallel_all_gather", "tensor_model_parallel_reduce_scatter", "all_reduce")


class Norm(nn.Module):
    def forward(self, x, residual=None):
        residual = x if residual is None else x + residual
        out = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
        return out if residual is x else (out, residual)


class Attention(nn.Module):
    """A mixer of all tokens, of which each rank computes a part of the result."""

    def __init__(self, rank, reduce):
        super().__init__()
        self.rank, self.reduce = rank, reduce

    def forward(self, positions, x):
        from vllm_ext import model

        assert len(x) == len(positions)
        out = x.cumsum(0) * torch.linspace(0.1, 1, HIDDEN) * (0.3 + self.rank)
        return model.all_reduce(out) if self.reduce else out


def trunk(rank, scattered):
    from vllm_ext.model import DecoderLayer, Qwen3NextModel

    def layer():
        made = DecoderLayer.__new__(DecoderLayer)
        nn.Module.__init__(made)
        made.full_attention, made.scattered = True, scattered
        made.input_layernorm = made.post_attention_layernorm = Norm()
        made.self_attn, made.mlp = Attention(rank, not scattered), nn.Tanh()
        return made

    made = Qwen3NextModel.__new__(Qwen3NextModel)
    nn.Module.__init__(made)
    made.scattered, made.start_layer, made.end_layer = scattered, 0, 3
    made.layers, made.norm, made.aux_hidden_state_layers = nn.ModuleList(layer() for _ in range(3)), Norm(), (1, 3)
    return made


def run(rank, port, queue):
    os.environ["VLLM_DIST_IDENT"] = f"scattered-{port}"  # as vLLM's executor does
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        get_tp_group,
        init_distributed_environment,
        initialize_model_parallel,
    )

    from vllm_ext import model

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(RANKS, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(RANKS)
    model.all_reduce = get_tp_group().all_reduce
    counts = Counter()
    for name in COLLECTIVES:
        function = getattr(model, name)

        def counted(*args, name=name, function=function):
            counts[name] += 1
            return function(*args)

        setattr(model, name, counted)
    found = {}
    for n in TOKENS:
        x = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n))
        for scattered in (False, True):
            counts.clear()
            out, aux = model.Qwen3NextModel.forward(trunk(rank, scattered), None, torch.arange(n), inputs_embeds=x)
            found[n, scattered] = [each.tolist() for each in (out, *aux)], dict(counts)
    queue.put((rank, found))
    cleanup_dist_env_and_memory()


@pytest.mark.exhaustive
def test_each_rank_has_all_tokens_in_the_end_with_fewer_bytes_on_the_way():
    from vllm.utils.network_utils import get_open_port

    context = torch.multiprocessing.get_context("spawn")
    queue, port = context.Queue(), get_open_port()
    processes = [context.Process(target=run, args=(rank, port, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=300) for _ in range(RANKS))
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert results[0] == results[1]
    for n in TOKENS:
        (whole, plain), (shares, scattered) = results[0][n, False], results[0][n, True]
        torch.testing.assert_close(torch.tensor(shares), torch.tensor(whole))
        assert plain == {"all_reduce": 3}
        assert scattered == {
            "tensor_model_parallel_reduce_scatter": 3,
            "tensor_model_parallel_all_gather": 4,  # before each attention, and once at the end
        }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"use_sequence_parallel_moe": False}, False),
        ({"pipeline_parallel_size": 2}, False),
        ({"mlp_only_layers": (1,)}, False),
        ({"num_experts": 0}, False),
    ],
)
def test_when_ranks_keep_a_share_of_the_tokens(change, expected):
    from qnext_plugin.config import QNextConfig
    from vllm_ext.config import scatters_tokens

    parallel = {"use_sequence_parallel_moe": True, "pipeline_parallel_size": 1}
    layers = {"num_hidden_layers": 4, "mlp_only_layers": (), "num_experts": 8, "decoder_sparse_step": 1}
    values = {name: change.get(name, value) for name, value in (parallel | layers).items()}
    config = SimpleNamespace(**{name: values[name] for name in layers})
    config.is_sparse = lambda idx: QNextConfig.is_sparse(config, idx)
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**{name: values[name] for name in parallel}))
    assert scatters_tokens(config, vllm_config) == expected
