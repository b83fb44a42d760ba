"""``qnext_plugin.ops`` on a GPU, and vLLM's fused prologue of an attention layer, against the float64 formulas."""

from collections.abc import Callable

import pytest
import torch

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.reference import formulas
from tests.support.tolerances import OPS, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

DIMS = GatedDeltaNetDims(2, 6, 24, 40)
EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
Random = Callable[..., torch.Tensor]


@pytest.fixture
def random(device: str) -> Random:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=F32: torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.interpreted
@BOTH
def test_chunked_gated_delta_rule(device: str, random: Random, dtype: torch.dtype) -> None:
    heads, lengths = DIMS.num_v_heads, [1, 63, 0, 130]
    q, k = random(2, sum(lengths), DIMS.num_k_heads, DIMS.head_k_dim, dtype=dtype)
    v = random(sum(lengths), heads, DIMS.head_v_dim, dtype=dtype)
    a, b = random(2, sum(lengths), heads, dtype=dtype)
    A_log, dt_bias = random(heads), random(heads, dtype=dtype)
    state = random(len(lengths), heads, DIMS.head_k_dim, DIMS.head_v_dim)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    g, beta = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
    out, final = ops.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=cu_seqlens)
    gates = formulas.gating(*(x.cpu().double() for x in (a, b, A_log, dt_bias)))
    end = 0
    for i, length in enumerate(lengths):
        rows, end = slice(end, end + length), end + length
        if not length:
            continue
        qkv = (x[rows].cpu().double() for x in (q, k, v))
        expected, states = formulas.gated_delta_rule(*qkv, *(x[rows] for x in gates), state[i].cpu().double())
        assert_close(out[rows].cpu(), expected, OPS[dtype], f"sequence of {length}")
        assert_close(final[i].cpu(), states[-1], OPS[dtype], f"state after {length}")


@pytest.mark.interpreted
@BOTH
def test_gated_norm(random: Random, dtype: torch.dtype) -> None:
    x, z = random(2, 194, DIMS.num_v_heads, DIMS.head_v_dim, dtype=dtype)
    weight = random(DIMS.head_v_dim, dtype=dtype)
    expected = formulas.rms_norm_gated(*(x.cpu().double() for x in (x, z, weight)), EPS)
    assert_close(ops.rms_norm_gated(x, z, weight, EPS).cpu(), expected, OPS[dtype], "gated norm")


@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "dim", "rotary"),
    [
        *((n, 16, 2, 256, 64) for n in (1, 5, 257)),
        *(pytest.param(n, 3, 1, 24, 8, marks=pytest.mark.interpreted) for n in (1, 5)),
    ],
)
def test_attention_prologue(
    device: str, random: Random, num_tokens: int, heads: int, kv_heads: int, dim: int, rotary: int
) -> None:
    """Split, QK norm, partial RoPE and gate."""
    from vllm.model_executor.layers.fused_qk_norm_rope import fused_qk_rmsnorm_rope_gate

    sections = [2 * heads * dim, kv_heads * dim, kv_heads * dim]
    q_gate, k, _ = random(num_tokens, sum(sections), dtype=BF16).split(sections, -1)
    q_weight, k_weight = 0.1 * random(2, dim, dtype=BF16)
    positions = torch.randint(0, 512, (num_tokens,), generator=torch.Generator().manual_seed(0))
    frequencies, _ = formulas.rope_frequencies({"rope_type": "default", "rope_theta": 1e7}, rotary, torch.float64)
    angles = torch.arange(512, dtype=torch.float64)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], -1).to(BF16)
    found = fused_qk_rmsnorm_rope_gate(
        q_gate, k, q_weight, k_weight, table.to(device), positions.to(device), EPS, heads, kv_heads, dim, rotary,
        norm_beta=1.0,
    )  # fmt: skip
    q, gate = q_gate.cpu().double().unflatten(-1, (heads, 2, dim)).unbind(-2)
    cos, sin = table.double()[positions].chunk(2, -1)
    expected = []
    for x, weight in ((q, q_weight), (k.cpu().double().unflatten(-1, (kv_heads, dim)), k_weight)):
        normed = formulas.zero_centered_rms_norm(x, weight.cpu().double(), EPS)
        expected.append(formulas.rotate(normed, cos, sin).flatten(-2))
    for name, actual, want in zip(("q", "k", "gate"), found, (*expected, gate.flatten(-2)), strict=True):
        assert_close(actual.cpu(), want, OPS[BF16], name)
