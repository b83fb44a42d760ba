"""Routed experts against one token and one expert at a time."""

import pytest
import torch
import torch.nn.functional as F

from qnext_plugin.ops.cpu import gemm_avx2
from qnext_plugin.ops.cpu.experts import routed_experts
from tests.support.tolerances import OPS, assert_close

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 7, 24, 10, 3


def plain(w13, w2):
    def product(x, weights, used, counts):
        parts = zip(x.to(weights.dtype).split(counts), used, strict=True)
        return torch.cat([F.linear(part, weights[i]) for part, i in parts])

    return (
        lambda x, rows, used, counts: product(x[rows], w13, used, counts),
        lambda x, used, counts: product(x, w2, used, counts),
    )


def compiled(w13, w2):
    w13, w2 = gemm_avx2.pack(w13), gemm_avx2.pack(w2)
    return (
        lambda x, rows, used, counts: gemm_avx2.products(x, w13, used, counts, rows, torch.float32)[
            :, : 2 * INTERMEDIATE
        ],
        lambda x, used, counts: gemm_avx2.products(x, w2, used, counts)[:, :HIDDEN],
    )


@pytest.mark.parametrize("first", [0, 3, 4, EXPERTS - 1])  # of those on this rank
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.bfloat16, plain), (torch.float32, plain), (torch.bfloat16, compiled)]
)
def test_routed_experts(dtype, weights, num_tokens, first):
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN).to(dtype)
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE).to(dtype)
    logits = torch.randn(num_tokens, EXPERTS)
    logits[:, 4] = -torch.inf  # nobody's choice
    topk_weights, ids = logits.softmax(-1).topk(TOP_K)
    expected = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, expert in zip(topk_weights[token].double(), ids[token], strict=True):
            if expert < first:
                continue
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (w2[expert].double() @ (F.silu(gate) * up))
    local = (ids - first).clamp_min(-1).int()
    found = routed_experts(x, topk_weights, local, *weights(w13[first:], w2[first:]))
    assert found.dtype == dtype
    assert_close(found, expected, OPS[dtype])
