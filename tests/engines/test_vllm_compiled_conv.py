"""The compiled convolution over vLLM's cache against the one in torch: outputs within rounding, states bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from qnext_plugin.config import GatedDeltaNetDims
from tests.support.tolerances import OPS, assert_close
from vllm_ext.cpu.compiled_conv import CompiledConv
from vllm_ext.cpu.phases import Drafts, Prefills, TorchConv

DIMS = GatedDeltaNetDims(num_k_heads=2, num_v_heads=6, head_k_dim=8, head_v_dim=5, conv_kernel_size=4)
DRAFTS = 2  # columns of the cache beyond the past


def both(phase, num_tokens, *batch):
    """What ``phase`` returns and stores, compiled and in torch, on caches that are alike."""
    found = []
    for conv in (CompiledConv(), TorchConv()):
        torch.manual_seed(0)
        x = torch.randn(num_tokens, DIMS.conv_dim + 3).bfloat16()[:, : DIMS.conv_dim]
        layer = SimpleNamespace(
            conv1d=SimpleNamespace(weight=torch.randn(DIMS.conv_dim, 1, DIMS.conv_kernel_size).bfloat16()),
            conv_kernel_size=DIMS.conv_kernel_size,
            kv_cache=[torch.randn(9, DIMS.conv_kernel_size - 1 + DRAFTS, DIMS.conv_dim).bfloat16()],
        )
        conv.prepare_weights(layer)
        found.append((getattr(conv, phase)(layer, x, *batch), layer.kv_cache[0]))
    (ours, our_cache), (theirs, their_cache) = found
    assert ours.dtype == torch.bfloat16
    assert_close(ours, theirs, OPS[torch.bfloat16])
    assert torch.equal(our_cache, their_cache)


def test_decode():
    both("decode", 3, torch.tensor([4, 1, 7], dtype=torch.int32))


@pytest.mark.parametrize("lengths", [[1], [5], [2, 1, 40, 3]])
def test_prefill(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    slots = torch.tensor([4, 1, 7, 2], dtype=torch.int32)[: len(lengths)]
    has_state = torch.tensor([True, False, False, True])[: len(lengths)]
    both("prefill", sum(lengths), Prefills(slots, has_state, cu_seqlens))


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1, 2]])
def test_verify(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    slots = torch.arange(9).view(3, 3)[: len(lengths)].int()
    metadata = SimpleNamespace(
        num_spec_decodes=len(lengths),
        spec_state_indices_tensor=slots,
        spec_query_start_loc=cu_seqlens,
        num_accepted_tokens=torch.tensor([2, 1, 3], dtype=torch.int32)[: len(lengths)],
    )
    drafts = Drafts.of(metadata)
    assert drafts.full == (len({*lengths}) == 1)
    both("verify", sum(lengths), drafts)
