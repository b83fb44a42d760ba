"""Products over packed weights are those over plain ones, and packing can be undone."""

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn

from sglang_ext.cpu_gemm import PACKS, plain_weights, routed_experts
from tests.tolerances import OPS, assert_close

pytestmark = pytest.mark.engine

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 7, 24, 10, 3


class Projection(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(33, 70).to(dtype), requires_grad=False)
        self.weight.weight_loader = "kept"
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x, bias):
        return self.quant_method.apply(self, x, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_packed_outside_of_loading_only(dtype):
    torch.manual_seed(0)
    model = Projection(dtype)
    param, plain = model.weight, model.weight.data.clone()
    x, bias = torch.randn(5, 80).to(dtype)[:, :70], torch.randn(33).to(dtype)
    for scale in (1, 2):  # the first load, then a later one
        with plain_weights(model):
            assert torch.equal(param, plain)
            param.data.copy_(plain := scale * plain)
        assert param.numel() == (0 if PACKS and dtype == torch.bfloat16 else plain.numel())
        assert_close(model(x, bias), F.linear(x.double(), plain.double(), bias.double()), OPS[dtype])
        assert model.weight is param and param.weight_loader == "kept"


def test_weights_are_packed_again_after_a_load_that_fails():
    model = Projection(torch.bfloat16)
    with plain_weights(model):
        pass
    with pytest.raises(ValueError, match="misshapen"), plain_weights(model):
        raise ValueError("misshapen")
    assert model(torch.zeros(1, 70, dtype=torch.bfloat16), None).shape == (1, 33)
    assert hasattr(model.weight, "packed") == PACKS


@pytest.mark.parametrize("first", [0, 3, 4, EXPERTS - 1])  # of those on this rank
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routed_experts(dtype, num_tokens, first):
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN).to(dtype)
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE).to(dtype)
    logits = torch.randn(num_tokens, EXPERTS)
    logits[:, 4] = -torch.inf  # nobody's choice
    weights, ids = logits.softmax(-1).topk(TOP_K)
    expected = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token].double(), ids[token], strict=True):
            if expert < first:
                continue
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (w2[expert].double() @ (F.silu(gate) * up))
    local = (ids - first).clamp_min(-1).int()
    assert_close(routed_experts(x, w13[first:], w2[first:], weights, local), expected, OPS[dtype])
