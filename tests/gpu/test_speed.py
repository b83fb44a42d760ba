"""Single operators, timed: ours, what vLLM's own Qwen3-Next runs, and other libraries where they are installed.

Times are recorded, not asserted. Calls are on different cache slots, so that nothing stays in the L2 cache.
"""

import gc
import math
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qnext_plugin.config import GatedDeltaNetDims

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

QWEN3_NEXT = GatedDeltaNetDims(16, 32, 128, 128)
SMALL = GatedDeltaNetDims(1, 2, 16, 16)
BF16 = torch.bfloat16
Record = Callable[..., None]


def sizes(*quick: int, more: tuple[int, ...] = (), interpreted: tuple[int, ...] = ()) -> list[Any]:
    return [
        *quick,
        *(pytest.param(size, marks=pytest.mark.exhaustive) for size in more),
        *(pytest.param(size, marks=pytest.mark.interpreted) for size in interpreted),
    ]


@pytest.fixture
def dims(device: str) -> GatedDeltaNetDims:
    gc.collect()  # the caches of the last test
    return QWEN3_NEXT if device == "cuda" else SMALL


@pytest.fixture
def record(record_property: Callable[[str, Any], None]) -> Record:
    """A function that records all of a dictionary, and whether a ``target`` was met."""

    def recorded(found: dict[str, Any], target: bool | None = None) -> None:
        for name, value in found.items():
            record_property(name, value)
        if target is not None:
            record_property("target", "met" if target else "missed")

    return recorded


def test_ceilings(device: str, record: Record) -> None:
    from tests.gpu.timing import reached

    record({"GB/s": reached().copy / 1e9, "TFLOP/s": reached().gemm / 1e12})


@pytest.mark.parametrize("batch", sizes(1, 8, 64, 256, more=(2, 4, 16, 32, 128), interpreted=(2,)))
@pytest.mark.parametrize("drafts", [0, 2])
def test_step(device: str, dims: GatedDeltaNetDims, record: Record, batch: int, drafts: int) -> None:
    """A decode, or with ``drafts`` a verification of as many, for each of ``batch`` sequences."""
    from tests.gpu import timing
    from tests.gpu.layer import Layer
    from tests.gpu.turns import Turn

    state = dims.num_v_heads * dims.head_k_dim * dims.head_v_dim * 4
    count = max(1, min(64, math.ceil((256 << 20) / (state * batch)))) if device == "cuda" else 1
    made = Layer(dims, BF16, num_drafts=drafts, num_slots=1 + count * batch * (1 + drafts), device=device)
    for cache_tensor in made.layer.kv_cache:
        cache_tensor.zero_()
    batches = [[Turn(timing.request(made), drafts=drafts or None) for _ in range(batch)] for _ in range(count)]
    times = {name: timing.seconds(each) for name, each in timing.calls(made, batches).items()}
    row = (dims.conv_dim + 2 * dims.value_dim + 2 * dims.num_v_heads) * BF16.itemsize
    window = dims.conv_dim * BF16.itemsize * (2 * (dims.conv_kernel_size - 1) + drafts)
    moved = batch * (state * (2 + drafts) + window + (1 + drafts) * row)
    found = timing.compare(times, moved=moved)
    record(found, target=found["speedup"] >= 1.3 and (batch < 64 or found.get("of_peak", 0) >= 0.8))


@pytest.mark.parametrize("length", sizes(1024, 16384, more=(256, 4096, 65536), interpreted=(5,)))
def test_prefill(device: str, dims: GatedDeltaNetDims, record: Record, length: int) -> None:
    """One sequence's prompt, with every backend of the chunked rule; vLLM's own choice is ``ours`` and ``native``."""
    from tests.gpu import timing
    from tests.gpu.layer import Layer
    from tests.gpu.turns import Turn

    times: dict[str, float] = {}
    problems, default = {}, ""
    for backend in ("triton", "auto") if device == "cuda" else ("triton",):
        try:
            made = Layer(dims, BF16, backend=backend, num_slots=4, device=device)
            name = made.layer.kernels.prefill.backend
            if f"ours {name}" not in times:
                both = timing.calls(made, [[Turn(made.request(), length)]])
                measured = {
                    f"{side} {name}": timing.seconds(each, graph=False, rounds=5) for side, each in both.items()
                }
                times |= measured
            default = name
        except Exception as e:
            if backend == "triton":
                raise
            problems[backend] = f"{type(e).__name__}: {e}"[:200]
    flops = 6.0 * length * dims.num_v_heads * dims.head_k_dim * dims.head_v_dim
    ours = times[f"ours {default}"]
    found = timing.compare({"ours": ours, "native": times[f"native {default}"]}, flops=flops)
    found |= {"backend": default, **{f"{name}_us": t * 1e6 for name, t in times.items()}, "tokens/s": length / ours}
    record(found | ({"problems": problems} if problems else {}), target=ours <= 1.02 * min(times.values()))


@pytest.mark.parametrize("num_tokens", sizes(1, 64, 256, 4096, interpreted=(2,)))
def test_attention_prologue(device: str, record: Record, num_tokens: int) -> None:
    """Split, QK norm, partial RoPE and gate of an attention layer of the 80B: fused, and compiled from its formulas."""
    from vllm.model_executor.layers.fused_qk_norm_rope import fused_qk_rmsnorm_rope_gate

    from tests.gpu import timing

    heads, kv_heads, dim, rotary = 16, 2, 256, 64
    sections = [2 * heads * dim, kv_heads * dim, kv_heads * dim]
    qkv = torch.randn(num_tokens, sum(sections), device=device, dtype=BF16)
    weight = torch.randn(dim, device=device, dtype=BF16)
    positions = torch.arange(num_tokens, device=device)
    table = torch.randn(max(num_tokens, 8), rotary, device=device, dtype=BF16)

    def ours() -> Any:
        q_gate, k, _ = qkv.split(sections, -1)
        return fused_qk_rmsnorm_rope_gate(
            q_gate, k, weight, weight, table, positions, 1e-6, heads, kv_heads, dim, rotary, norm_beta=1.0
        )

    def unfused(qkv: torch.Tensor) -> Any:
        q_gate, k, _ = qkv.split(sections, -1)
        q, gate = q_gate.unflatten(-1, (heads, 2, dim)).unbind(-2)
        cos, sin = table[positions].float()[:, None].chunk(2, -1)
        out = []
        for x in (q, k.unflatten(-1, (kv_heads, dim))):
            x = F.rms_norm(x.float(), (dim,), 1 + weight.float(), 1e-6)
            first, second, rest = x.split([rotary // 2, rotary // 2, dim - rotary], -1)
            turned = [first * cos - second * sin, second * cos + first * sin, rest]
            out.append(torch.cat(turned, -1).to(BF16).flatten(1))
        return *out, gate.reshape(len(gate), -1)

    compiled = torch.compile(unfused) if device == "cuda" else unfused
    times = {"ours": timing.seconds([ours] * 8), "native": timing.seconds([lambda: compiled(qkv)] * 8)}
    record(timing.compare(times, moved=2 * qkv.numel() * qkv.itemsize))


@cache
def expert_weights() -> tuple[torch.Tensor, torch.Tensor]:
    w1 = torch.randn(512, 1024, 2048, device="cuda", dtype=BF16)
    return w1, torch.randn(512, 2048, 512, device="cuda", dtype=BF16)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_experts(device: str, record: Record, batch: int) -> None:
    """The routed experts of an 80B layer, which ours and the native model call alike: how near memory's limit."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    from tests.gpu import timing

    w1, w2 = expert_weights()
    x = torch.randn(batch, 2048, device=device, dtype=BF16)
    weights = torch.full((batch, 10), 0.1, device=device)
    routes = [torch.rand(batch, 512, device=device).topk(10, -1).indices.int() for _ in range(8)]
    each = [lambda ids=ids: fused_experts(x, w1, w2, weights, ids) for ids in routes]
    hit = statistics.mean(len(ids.unique()) for ids in routes)
    record(timing.compare({"ours": timing.seconds(each)}, moved=hit * 3 * 512 * 2048 * BF16.itemsize))


@pytest.mark.parametrize("length", [1024, 16384])
def test_flash_linear_attention(device: str, dims: GatedDeltaNetDims, record: Record, length: int) -> None:
    """The chunked rule alone: flash-linear-attention against what vLLM vendors."""
    pytest.importorskip("fla", exc_type=Exception)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule as vendored

    from tests.gpu import timing

    q, k = F.normalize(torch.randn(2, 1, length, dims.num_k_heads, dims.head_k_dim, device=device), dim=-1).to(BF16)
    v = torch.randn(1, length, dims.num_v_heads, dims.head_v_dim, device=device).to(BF16)
    shared = {
        "g": -torch.rand(1, length, dims.num_v_heads, device=device),
        "beta": torch.rand(1, length, dims.num_v_heads, device=device),
        "initial_state": torch.zeros(1, dims.num_v_heads, dims.head_v_dim, dims.head_k_dim, device=device),
        "output_final_state": True,
        "cu_seqlens": torch.tensor([0, length], device=device, dtype=torch.int32),
    }

    @torch.inference_mode()
    def fla() -> None:
        chunk_gated_delta_rule(q, k, v, state_v_first=True, **shared)

    @torch.inference_mode()
    def ours() -> None:
        vendored(q, k, v, **shared)

    times = {"ours": timing.seconds([ours], graph=False), "fla": timing.seconds([fla], graph=False)}
    record(timing.compare(times))


@pytest.mark.parametrize("batch", [1, 64, 256])
def test_causal_conv1d(device: str, dims: GatedDeltaNetDims, record: Record, batch: int) -> None:
    """One token's convolution: vLLM's kernel on its cache layout against the causal-conv1d package."""
    pytest.importorskip("causal_conv1d", exc_type=Exception)
    from causal_conv1d import causal_conv1d_update
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as engine_update

    from tests.gpu import timing

    x = torch.randn(batch, dims.conv_dim, device=device, dtype=BF16)
    weight = torch.randn(dims.conv_dim, dims.conv_kernel_size, device=device, dtype=BF16)
    state = torch.zeros(batch + 1, dims.conv_kernel_size - 1, dims.conv_dim, device=device, dtype=BF16).mT
    slots = torch.arange(1, batch + 1, device=device, dtype=torch.int32)

    def ours() -> None:
        engine_update(x, state, weight, None, "silu", conv_state_indices=slots)

    def theirs() -> None:
        causal_conv1d_update(x, state, weight, None, "silu", conv_state_indices=slots)

    times = {"ours": timing.seconds([ours] * 8), "causal_conv1d": timing.seconds([theirs] * 8)}
    record(timing.compare(times))
