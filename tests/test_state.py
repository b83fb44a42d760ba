"""Shapes and bytes of the per-sequence state."""

import pytest
import torch

from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.plan.state import StateSpec

DIMS_80B = GatedDeltaNetDims(num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128, conv_kernel_size=4)
ODD_DIMS = GatedDeltaNetDims(num_k_heads=3, num_v_heads=6, head_k_dim=5, head_v_dim=7, conv_kernel_size=3)


@pytest.mark.parametrize(
    "dims, dtypes, num_draft_tokens, conv_shape, recurrent_shape, page_bytes",
    [
        (DIMS_80B, (torch.bfloat16, torch.float32), 0, (8192, 3), (32, 128, 128), 49_152 + 2_097_152),
        (DIMS_80B, (torch.bfloat16, torch.float32), 2, (8192, 5), (32, 128, 128), 81_920 + 2_097_152),
        (DIMS_80B, (torch.float32, torch.bfloat16), 0, (8192, 3), (32, 128, 128), 98_304 + 1_048_576),
        (ODD_DIMS, (torch.float16, torch.float32), 1, (72, 3), (6, 5, 7), 432 + 840),
    ],
)
def test_shapes_and_bytes(dims, dtypes, num_draft_tokens, conv_shape, recurrent_shape, page_bytes):
    spec = StateSpec(dims, *dtypes, num_draft_tokens=num_draft_tokens)
    assert spec.conv_shape == conv_shape
    assert spec.recurrent_shape == recurrent_shape
    assert spec.page_bytes == page_bytes


def test_recurrent_state_is_float32_unless_told_otherwise():
    assert StateSpec(DIMS_80B, torch.bfloat16).recurrent_dtype == torch.float32


def test_one_rank_holds_its_share_of_the_bytes():
    whole, shard = (StateSpec(dims, torch.bfloat16, num_draft_tokens=1) for dims in (DIMS_80B, DIMS_80B.shard(8)))
    assert shard.page_bytes * 8 == whole.page_bytes
