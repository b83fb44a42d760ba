"""A row's result is the same in every bit alone and in a batch of up to 32, wherever it stands there."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qnext_plugin import ops
from qnext_plugin.ops.cpu import delta_rule, gemm_avx2, multiply, quantized
from qnext_plugin.ops.cpu.experts import routed_experts
from tests.support.packed import FORMS, IDS, pack, weights

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="wants AVX2")

ROWS = 32
SIZES = (2, 3, 4, 5, 6, 7, 8, 12, 13, 31, 32)
EXPERTS, TOP_K = 24, 5
Rows = Callable[[Tensor], Tensor]
"""A function of the indices of some rows that returns what is computed for them together."""


def check(rows: Rows, sizes: tuple[int, ...] = SIZES) -> None:
    """Compare the rows of batches of ``sizes`` with each alone, in one thread and more."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([rows(torch.tensor([i])) for i in range(ROWS)])
        assert bool(alone.isfinite().all()) and not torch.equal(alone[0], alone[1])
        for threads, some in ((1, sizes), (2, sizes), (3, sizes[-1:])):
            torch.set_num_threads(threads)
            for size in some:
                order = torch.randperm(ROWS)[:size]
                off = (rows(order).double() - alone[order].double()).abs().flatten(1).amax(1)
                assert not off.any(), f"{size} rows, {threads} threads: off by {off.max():.3g}, {(off > 0).sum()} rows"
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 96), (33, 70), (160, 128), (512, 2048)])
def test_products(n, k, dtype, out):
    packed, x = gemm_avx2.pack(torch.randn(n, k).bfloat16()), torch.randn(ROWS, k).to(dtype)
    check(lambda rows: gemm_avx2.products(x, packed, rows=rows, dtype=out)[:, :n])


def test_linear_with_a_bias():
    packed, bias, x = gemm_avx2.pack(torch.randn(160, 96).bfloat16()), torch.randn(160), torch.randn(ROWS, 96)
    check(lambda rows: gemm_avx2.linear(x[rows].bfloat16(), packed, bias.bfloat16(), 160))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_quantized_products(form):
    """As far as codes are decoded in registers; more rows are multiplied in another way, with less rounding."""
    form, *parts = weights(*form, 33)
    packed, x = pack(form, *parts), torch.randn(ROWS, form.k)
    few = tuple(size for size in SIZES if size <= multiply.FEW)
    check(lambda rows: quantized.products(form, x, packed, rows=rows, dtype=torch.float32)[:, :33], few)


def experts(w13, w2, x, topk_weights, ids, gate_up, down, hidden, intermediate):
    def first(x, rows, used, counts):
        return gate_up(x, w13, used, counts, rows, torch.float32)[:, : 2 * intermediate]

    def second(x, used, counts):
        return down(x, w2, used, counts)[:, :hidden]

    return lambda rows: routed_experts(x[rows], topk_weights[rows], ids[rows], first, second)


@pytest.mark.parametrize("first", [0, 5])  # of the experts on this rank
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 10), (128, 40), (2048, 512)])
def test_experts(hidden, intermediate, first):
    w13, w2 = torch.randn(EXPERTS, 2 * intermediate, hidden), torch.randn(EXPERTS, hidden, intermediate)
    topk_weights, ids = ops.route(torch.randn(ROWS, EXPERTS), top_k=TOP_K, renormalize=True)
    x = torch.randn(ROWS, hidden).bfloat16()
    w13, w2 = (gemm_avx2.pack(weight.bfloat16()[first:]) for weight in (w13, w2))
    ids = (ids - first).clamp_min(-1).int()
    products = gemm_avx2.products
    check(experts(w13, w2, x, topk_weights, ids, products, products, hidden, intermediate))


def test_quantized_experts():
    """As far as codes are decoded in registers."""
    form13, *parts13 = weights("u4", torch.bfloat16, 256, 128, False, 80, EXPERTS)
    form2, *parts2 = weights("e4m3", torch.float32, 40, 40, False, 256, EXPERTS)
    w13, w2 = pack(form13, *parts13), pack(form2, *parts2)
    topk_weights, ids = ops.route(torch.randn(ROWS, EXPERTS), top_k=TOP_K, renormalize=True)
    x, few = torch.randn(ROWS, 256).bfloat16(), tuple(size for size in SIZES if size <= multiply.FEW)
    check(lambda rows: quantized.experts((form13, form2), x[rows], w13, w2, topk_weights[rows], ids[rows]), few)


def gated(heads: int, key_heads: int, size: int):
    """Return what a DeltaNet layer's projections give, and its parameters."""
    q, k = torch.randn(2, ROWS, key_heads, size).bfloat16()
    v, (a, b) = torch.randn(ROWS, heads, size).bfloat16(), torch.randn(2, ROWS, heads).bfloat16()
    return q, k, v, a, b, torch.randn(heads), torch.randn(heads).bfloat16()


@pytest.mark.parametrize("heads", [2, 3, 8, 16, 32])
def test_gating(heads):
    *_, a, b, A_log, dt_bias = gated(heads, 1, 8)
    ba = torch.cat([b, a], 1)

    def rows(indices):
        b, a = ba[indices].chunk(2, dim=-1)
        return torch.stack(ops.gating(a, b, A_log=A_log, dt_bias=dt_bias), 1)

    check(rows)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(6, 2, 24), (8, 8, 16), (32, 16, 64)])
@pytest.mark.parametrize("compiled", [True, False])
def test_decode(compiled, heads, key_heads, size):
    q, k, v, a, b, A_log, dt_bias = gated(heads, key_heads, size)
    states = torch.randn(ROWS, heads, size, size)

    def rows(indices):
        g, beta = ops.gating(a[indices], b[indices], A_log=A_log, dt_bias=dt_bias)
        qkv = [x[indices] for x in (q, k, v)]
        if compiled:
            after = states[indices]
            slots = torch.randperm(len(indices))
            after[slots] = states[indices]
            out = delta_rule.decode(*qkv, g=g, beta=beta, states=after, slots=slots)
            after = after[slots]
        else:
            out, after = ops.recurrent_gated_delta_rule(*qkv, g=g, beta=beta, initial_state=states[indices])
        return torch.cat([out.float().flatten(1), after.flatten(1)], 1)

    check(rows)


@pytest.mark.parametrize("channels", [30, 96, 8192])
def test_convolution_of_a_step(channels):
    x, weight, states = torch.randn(ROWS, channels), torch.randn(channels, 4), torch.randn(ROWS, channels, 3)

    def rows(indices):
        out, after = ops.causal_conv1d_update(x[indices].bfloat16(), weight, conv_state=states[indices].bfloat16())
        return torch.cat([out.flatten(1), after.flatten(1)], 1)

    check(rows)


@pytest.mark.parametrize(("heads", "size"), [(1, 96), (1, 2048), (6, 24), (32, 128)])
def test_norms(heads, size):
    x, gate, weight = *torch.randn(2, ROWS, heads, size).bfloat16(), torch.randn(size).bfloat16()
    check(lambda rows: ops.zero_centered_rms_norm(x[rows], weight, 1e-6).flatten(1))
    check(lambda rows: ops.rms_norm_gated(x[rows], gate[rows], weight, 1e-6).flatten(1))


@pytest.mark.parametrize("num_experts", [7, 24, 512])
def test_routing(num_experts):
    logits = torch.randn(ROWS, num_experts)
    check(lambda rows: torch.cat([x.float() for x in ops.route(logits[rows], top_k=5, renormalize=True)], 1))


PROMPTS = [int(length) for length in torch.linspace(32, 90, ROWS)]


@pytest.mark.parametrize("channels", [30, 96])
def test_convolution_of_prompts(channels):
    x, weight = [torch.randn(length, channels) for length in PROMPTS], torch.randn(channels, 4)
    states = torch.randn(ROWS, channels, 3)

    def rows(indices):
        cu_seqlens = torch.tensor([0, *(PROMPTS[i] for i in indices)]).cumsum(0)
        packed = torch.cat([x[i] for i in indices])
        out, after = ops.causal_conv1d(packed, weight, conv_state=states[indices], cu_seqlens=cu_seqlens)
        last = torch.stack([o.sum(0) for o in out.split([PROMPTS[i] for i in indices])])
        return torch.cat([last, after.flatten(1)], 1)

    check(rows)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(6, 2, 24), (8, 4, 64)])
def test_prompts(heads, key_heads, size):
    """Those of at least a chunk; shorter ones alone are computed in smaller chunks."""
    tokens = [
        [torch.randn(n, h, size) for h in (key_heads, key_heads, heads)] + [-torch.rand(n, heads), torch.rand(n, heads)]
        for n in PROMPTS
    ]
    states = torch.randn(ROWS, heads, size, size)

    def rows(indices):
        q, k, v, g, beta = (torch.cat([tokens[i][j] for i in indices]) for j in range(5))
        cu_seqlens = torch.tensor([0, *(PROMPTS[i] for i in indices)]).cumsum(0)
        out, after = ops.chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=states[indices], cu_seqlens=cu_seqlens, chunk_size=32
        )
        last = torch.stack([o[-1] for o in out.split([PROMPTS[i] for i in indices])])
        return torch.cat([last.flatten(1), after.flatten(1)], 1)

    check(rows)
