"""Which branch our SGLang layers take on a GPU, shown without one."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.config import QNextConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_random_checkpoint(directory)
    return QNextConfig.from_pretrained(directory)


def pretend(monkeypatch, module, *, is_cuda):
    """Build the layers of ``module`` from stand-ins, on what says it is a GPU."""
    from torch import nn

    names = [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    own = {"MLP", "GatedAttention", "SparseMoeBlock"}
    for name in {
        *names,
        "get_rope",
        "build",
        "get_parallel",
        "get_moe_impl_class",
        "get_exec",
        "TopK",
        "bind_topk",
    } - own:
        monkeypatch.setattr(module, name, MagicMock(), raising=False)
    monkeypatch.setattr(module, "is_cuda", lambda: is_cuda)


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "fused"),
    [(True, torch.bfloat16, True), (True, torch.float32, False), (False, torch.bfloat16, False)],
)
def test_fused_attention_prologue_is_not_for_float32(monkeypatch, config, is_cuda, dtype, fused):
    from sglang_ext import gated_attention

    pretend(monkeypatch, gated_attention, is_cuda=is_cuda)
    gated_attention.get_parallel.return_value.attn_tp_size = 1
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert gated_attention.GatedAttention(config, 0, None, "layer").fused == fused
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("scattered", [False, True])
def test_shared_expert_is_whole_where_ranks_route_their_own_tokens(monkeypatch, config, scattered):
    from sglang_ext import sparse_moe

    pretend(monkeypatch, sparse_moe, is_cuda=True)
    sparse_moe.get_parallel.return_value.tp_size = 1
    sparse_moe.get_exec.return_value.moe.ep_num_redundant_experts = 0
    monkeypatch.setattr(sparse_moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_megamoe=lambda: False))
    monkeypatch.setattr(sparse_moe, "is_moe_input_scattered_across_dp_ranks", lambda: scattered)
    made = MagicMock()
    monkeypatch.setattr(sparse_moe, "MLP", made)
    sparse_moe.SparseMoeBlock(config, 0, None, "layer")
    assert made.call_args.kwargs["replicated"] == scattered


def test_megamoe_is_refused(monkeypatch, config):
    from sglang_ext import sparse_moe

    monkeypatch.setattr(sparse_moe, "get_moe_a2a_backend", lambda: SimpleNamespace(is_megamoe=lambda: True))
    with pytest.raises(ValueError, match="--moe-a2a-backend megamoe found, expected another one"):
        sparse_moe.SparseMoeBlock(config, 0, None, "layer")
