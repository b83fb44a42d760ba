"""Products over packed weights are those over plain ones, also of weights that are loaded again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.fused_moe import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.support.tolerances import OPS, assert_close
from vllm_ext.cpu.gemm import (
    CompiledExperts,
    DraftHeadMethod,
    PackedExperts,
    PackedLinearMethod,
    fits,
    packs,
    packs_for_vllm,
)

pytestmark = pytest.mark.skipif(not packs(), reason="this CPU is served by vLLM's own choice")

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 7, 96, 40, 3
TOKENS = [1, 2, 5, 40, 300]


def plain(*shape):
    return nn.Parameter(torch.randn(shape).bfloat16(), requires_grad=False)


class Projection(nn.Module):
    def __init__(self, rows, dtype=torch.bfloat16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 64).to(dtype), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_linear(num_tokens):
    torch.manual_seed(num_tokens)
    method, layer = PackedLinearMethod(), Projection(160)
    x, bias = torch.randn(num_tokens, 80).bfloat16()[:, :64], torch.randn(160).bfloat16()
    run = torch.compile(lambda x: method.apply(layer, x, bias), fullgraph=True, dynamic=True, backend="eager")
    for _ in range(2):  # the first load, then a later one
        weight = plain(160, 64)
        layer.weight = nn.Parameter(weight.data.clone(), requires_grad=False)
        method.process_weights_after_loading(layer)
        assert_close(run(x), F.linear(x.double(), weight.double(), bias.double()), OPS[torch.bfloat16])


@pytest.mark.skipif(not packs_for_vllm(), reason="vLLM has an int8 product for AVX512 only")
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_draft_head(num_tokens):
    """Within the rounding of two operands to 8 bits; rows that pad the vocabulary stay zero."""
    torch.manual_seed(num_tokens)
    method, layer, x = DraftHeadMethod(), nn.Module(), torch.randn(num_tokens, 96).bfloat16()
    for _ in range(2):  # the first load, then a later one
        weight = plain(320, 96)
        weight[:160] *= 50
        weight[281:] = 0
        layer.weight = nn.Parameter(weight.data.clone(), requires_grad=False)
        method.process_weights_after_loading(layer)
        actual, expected = method.apply(layer, x).double(), x.double() @ weight.double().t()
        for rows in (slice(160), slice(160, 281)):
            assert (actual - expected)[:, rows].norm() < 0.02 * expected[:, rows].norm()
        assert not actual[:, 281:].any()


@pytest.mark.parametrize(("shape", "dtype", "expected"), [
    ((64, 96), torch.bfloat16, True),
    ((63, 96), torch.bfloat16, False),
    ((64, 80), torch.bfloat16, False),
    ((64, 96), torch.float32, False),
])  # fmt: skip
def test_fits(shape, dtype, expected):
    assert fits(torch.empty(shape, dtype=dtype)) == expected


@pytest.fixture
def experts():
    moe = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    return (PackedExperts if packs_for_vllm() else CompiledExperts)(moe, FusedMoEQuantConfig.make())


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("first", [None, 0, 3])
def test_experts(experts, num_tokens, first):
    """Of which a rank has all, or four from ``first`` on."""
    torch.manual_seed(num_tokens)
    x, w13, w2 = (
        plain(num_tokens, HIDDEN),
        plain(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        plain(EXPERTS, HIDDEN, INTERMEDIATE),
    )
    logits = torch.randn(num_tokens, EXPERTS)
    logits[:, 4] = -torch.inf  # nobody's choice
    weights, ids = logits.softmax(-1).topk(TOP_K)
    local = range(EXPERTS) if first is None else range(first, first + 4)
    expert_map = None if first is None else torch.full((EXPERTS,), -1, dtype=torch.int32)
    if expert_map is not None:
        expert_map[first : first + 4] = torch.arange(4, dtype=torch.int32)
    expected = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            if expert in local:
                gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
                expected[token] += weight * (w2[expert].double() @ (F.silu(gate) * up))
    layer, out = nn.Module(), torch.full((num_tokens, HIDDEN), 7.0).bfloat16()
    layer.w13_weight, layer.w2_weight = (
        nn.Parameter(w[local.start : local.stop].clone(), requires_grad=False) for w in (w13, w2)
    )
    experts.process_weights_after_loading(layer)
    experts.apply(
        out, x, layer.w13_weight, layer.w2_weight, weights, ids.int(), MoEActivation.SILU, EXPERTS, expert_map
    )
    assert_close(out, expected, OPS[torch.bfloat16])


def test_vllm_registers_kernels_after_llvmlite_is_loaded():
    """As a second engine in a process does."""
    from vllm.triton_utils.dispatcher import _rebind_kernels

    _rebind_kernels([(object(), print)])
