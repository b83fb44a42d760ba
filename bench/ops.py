"""Single operators, timed: ours, the sequence that vLLM's own Qwen3-Next runs, and other libraries where importable.

    python -m bench.ops [--quick] [--out FILE]

On a GPU each time is that of a CUDA graph of calls on different cache slots, so that nothing stays in the L2 cache and
no launch counts, or for prefills that of eager calls; medians between CUDA events. A rate is what has to be moved or
multiplied at the least over that time, and ``of_peak`` is that over what a copy or a matrix product reaches here.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu_check.report import LEFT_OUT, Report

if not torch.cuda.is_available():
    from bench.gpu_check import interpreter

    interpreter.enable()

from vllm.model_executor.layers.fused_qk_norm_rope import fused_qk_rmsnorm_rope_gate
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule, QwenGatedDeltaNetAttention
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd

from bench.gpu_check.layer import PREFIX, Layer, OneLaunch, Request, Turn
from qnext_plugin.bench import ceilings
from qnext_plugin.bench.ceilings import Ceilings
from qnext_plugin.config import GatedDeltaNetDims

torch._dynamo.config.suppress_errors = True
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DIMS = GatedDeltaNetDims(16, 32, 128, 128) if GPU else GatedDeltaNetDims(1, 2, 16, 16)
BF16 = torch.bfloat16
Call = Callable[[], Any]


def seconds(calls: Sequence[Call], graph: bool = True, rounds: int = 9) -> float:
    """Median time of one of ``calls``, which do the same on different data."""
    if not GPU:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
        torch.cuda.synchronize()
        run = lambda: [call() for call in calls]  # noqa: E731
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                for call in calls:
                    call()
            run = captured.replay
        run()
        times = []
        for _ in range(rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


@cache
def reached() -> Ceilings:
    return ceilings.measure(BF16, DEVICE)


def compare(times: dict[str, float], moved: float = 0.0, flops: float = 0.0) -> dict[str, Any]:
    """``times`` in seconds by name, ours first, and how ours does."""
    found: dict[str, Any] = {f"{name}_us": t * 1e6 for name, t in times.items()}
    ours = times["ours"]
    others = {name: t for name, t in times.items() if name != "ours"}
    if "native" in times:
        found["speedup"] = times["native"] / ours
    if others:
        found["best_other"] = min(others, key=others.__getitem__)
    if moved:
        found |= {"GB/s": moved / ours / 1e9, "of_peak": moved / ours / reached().copy}
    if flops:
        found |= {"TFLOP/s": flops / ours / 1e12, "of_peak": flops / ours / reached().gemm}
    return found


def native_layer(made: Layer) -> Any:
    """vLLM's own layer for this architecture over the same weights and cache, without its projections."""
    dims, ours = made.dims, made.layer
    native = QwenGatedDeltaNetAttention.__new__(QwenGatedDeltaNetAttention)
    torch.nn.Module.__init__(native)
    values = {
        "prefix": PREFIX,
        "tp_size": 1,
        "num_k_heads": dims.num_k_heads,
        "num_v_heads": dims.num_v_heads,
        "head_k_dim": dims.head_k_dim,
        "head_v_dim": dims.head_v_dim,
        "key_dim": dims.key_dim,
        "value_dim": dims.value_dim,
        "activation": "silu",
        "conv1d": SimpleNamespace(weight=ours.conv1d.weight, bias=None),
        "A_log": ours.A_log,
        "dt_bias": ours.dt_bias,
        "kv_cache": ours.kv_cache,
        "enable_packed_recurrent_decode": True,
        "_prefill_kernels_warmed_up": True,
    }
    for name, value in values.items():
        object.__setattr__(native, name, value)
    with made.context():
        native.chunk_gated_delta_rule = ChunkGatedDeltaRule()
    return native


def calls(made: Layer, turns: Sequence[Sequence[Turn]]) -> dict[str, list[Call]]:
    """The layer between its projections, ours and native, on each batch of ``turns``."""
    dims, layer, native = made.dims, made.layer, native_layer(made)

    def inputs(mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, z, b, a = native.fix_query_key_value_ordering(mixed_qkvz, ba)
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], -1), z, b.contiguous(), a.contiguous()

    # As in the engine, which compiles what surrounds its kernels.
    inputs = torch.compile(inputs, dynamic=True) if GPU else inputs
    with made.context():
        one_launch = OneLaunch(dims, made.config)
    found: dict[str, list[Call]] = {"ours": [], "native": [], "one launch": []}
    for batch in turns:
        metadata = made.metadata(batch)
        if metadata.spec_state_indices_tensor is not None:  # as the builder leaves it for full graphs
            metadata.spec_state_indices_tensor = metadata.spec_state_indices_tensor.contiguous()
        n = sum(turn.length for turn in batch)
        mixed = torch.randn(n, dims.conv_dim + dims.value_dim, device=DEVICE, dtype=BF16)
        ba = torch.randn(n, 2 * dims.num_v_heads, device=DEVICE, dtype=BF16)
        out = torch.empty(n, dims.num_v_heads, dims.head_v_dim, device=DEVICE, dtype=BF16)

        def ours(metadata: Any = metadata, mixed: Any = mixed, ba: Any = ba, out: Any = out) -> None:
            with made.context(metadata), torch.inference_mode():
                layer._forward_core_fused_norm_packed(mixed, ba, out)

        def theirs(metadata: Any = metadata, mixed: Any = mixed, ba: Any = ba, out: Any = out) -> None:
            with made.context(metadata), torch.inference_mode():
                qkv, z, b, a = inputs(mixed, ba)
                out.zero_()
                native._forward_core(qkv, b, a, out)
                flat = out.view(-1, dims.head_v_dim)
                layer_norm_fwd(
                    flat, layer.norm.weight, None, layer.norm.eps, z=z.reshape(-1, dims.head_v_dim), out=flat,
                    is_rms_norm=True, activation="silu",
                )  # fmt: skip

        def single(ours: Call = ours) -> None:
            served, layer.kernels = layer.kernels, one_launch
            ours()
            layer.kernels = served

        found["ours"].append(ours)
        found["native"].append(theirs)
        if metadata.num_prefills == 0:
            found["one launch"].append(single)
    return found


def _batches(made: Layer, count: int, size: int, **turn: Any) -> list[list[Turn]]:
    def request() -> Request:
        new = made.request()
        new.tokens = torch.zeros(1, *new.tokens.shape[1:], dtype=made.dtype)
        return new

    return [[Turn(request(), **turn) for _ in range(size)] for _ in range(count)]


def decode_step(batch: int, drafts: int) -> dict[str, Any]:
    """A decode, or with ``drafts`` a verification of as many, for each of ``batch`` sequences."""
    gc.collect()  # the caches of the last check
    state = DIMS.num_v_heads * DIMS.head_k_dim * DIMS.head_v_dim * 4
    count = max(1, min(64, math.ceil((256 << 20) / (state * batch)))) if GPU else 1
    made = Layer(DIMS, BF16, num_drafts=drafts, num_slots=1 + count * batch * (1 + drafts), device=DEVICE)
    for cache_tensor in made.layer.kv_cache:
        cache_tensor.zero_()
    turn = {"drafts": drafts} if drafts else {}
    found = calls(made, _batches(made, count, batch, **turn))
    tokens = batch * (1 + drafts)
    row = (DIMS.conv_dim + 2 * DIMS.value_dim + 2 * DIMS.num_v_heads) * BF16.itemsize
    window = DIMS.conv_dim * BF16.itemsize * (2 * (DIMS.conv_kernel_size - 1) + drafts)
    moved = batch * (state * (2 + drafts) + window) + tokens * row
    result = compare({name: seconds(each) for name, each in found.items()}, moved=moved)
    result["one launch speedup"] = result["native_us"] / result["one launch_us"]
    result["target"] = _target(result["speedup"] >= 1.3 and (batch < 64 or result["of_peak"] >= 0.8))
    return result


def _target(met: bool) -> str:
    return "met" if met else "missed"


def prefill(length: int) -> dict[str, Any]:
    """One sequence's prompt, with every backend of the chunked rule."""
    times: dict[str, float] = {}
    problems = {}
    for backend in ("triton", "auto") if GPU else ("triton",):
        try:
            made = Layer(DIMS, BF16, backend=backend, num_slots=4, device=DEVICE)
            found = calls(made, [[Turn(made.request(), length)]])
            name = made.layer.kernels.prefill_backend
            if f"ours {name}" in times:
                continue
            for side in ("ours", "native"):
                each = found[side]
                times[f"{side} {name}"] = seconds(each, graph=False, rounds=5)
        except Exception as e:
            problems[backend] = f"{type(e).__name__}: {e}"[:200]
    default = made.layer.kernels.prefill_backend
    if f"ours {default}" not in times:
        default = "triton"
    flops = 6.0 * length * DIMS.num_v_heads * DIMS.head_k_dim * DIMS.head_v_dim
    result = compare({"ours": times[f"ours {default}"], "native": times[f"native {default}"]}, flops=flops)
    result |= {"backend": default, **{f"{name}_us": t * 1e6 for name, t in times.items()}}
    result["tokens/s"] = length / times[f"ours {default}"]
    result["target"] = _target(times[f"ours {default}"] <= 1.02 * min(times.values()))
    return result | ({"problems": str(problems)} if problems else {})


def rule(length: int) -> dict[str, Any]:
    """The chunked rule alone: flash-linear-attention against what vLLM vendors."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule as vendored

    q, k = F.normalize(torch.randn(2, 1, length, DIMS.num_k_heads, DIMS.head_k_dim, device=DEVICE), dim=-1).to(BF16)
    v = torch.randn(1, length, DIMS.num_v_heads, DIMS.head_v_dim, device=DEVICE).to(BF16)
    g = -torch.rand(1, length, DIMS.num_v_heads, device=DEVICE)
    beta = torch.rand(1, length, DIMS.num_v_heads, device=DEVICE)
    state = torch.zeros(1, DIMS.num_v_heads, DIMS.head_v_dim, DIMS.head_k_dim, device=DEVICE)
    cu_seqlens = torch.tensor([0, length], device=DEVICE, dtype=torch.int32)
    shared = {"g": g, "beta": beta, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}

    def fla() -> None:
        with torch.inference_mode():
            chunk_gated_delta_rule(q, k, v, state_v_first=True, **shared)

    def ours() -> None:
        with torch.inference_mode():
            vendored(q, k, v, **shared)

    return compare({"ours": seconds([ours], graph=False), "fla": seconds([fla], graph=False)})


def convolution(batch: int) -> dict[str, Any]:
    """One token's convolution: vLLM's kernel on its cache layout against the causal-conv1d package."""
    from causal_conv1d import causal_conv1d_update
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as engine_update

    x = torch.randn(batch, DIMS.conv_dim, device=DEVICE, dtype=BF16)
    weight = torch.randn(DIMS.conv_dim, DIMS.conv_kernel_size, device=DEVICE, dtype=BF16)
    state = torch.zeros(batch + 1, DIMS.conv_kernel_size - 1, DIMS.conv_dim, device=DEVICE, dtype=BF16).mT
    slots = torch.arange(1, batch + 1, device=DEVICE, dtype=torch.int32)

    def ours() -> None:
        engine_update(x, state, weight, None, "silu", conv_state_indices=slots)

    def theirs() -> None:
        causal_conv1d_update(x, state, weight, None, "silu", conv_state_indices=slots)

    return compare({"ours": seconds([ours] * 8), "causal_conv1d": seconds([theirs] * 8)})


def prologue(num_tokens: int) -> dict[str, Any]:
    """Split, QK norm, partial RoPE and gate of an attention layer of the 80B: fused, and compiled from its formulas."""
    heads, kv_heads, dim, rotary = 16, 2, 256, 64
    sections = [2 * heads * dim, kv_heads * dim, kv_heads * dim]
    qkv = torch.randn(num_tokens, sum(sections), device=DEVICE, dtype=BF16)
    weight = torch.randn(dim, device=DEVICE, dtype=BF16)
    positions = torch.arange(num_tokens, device=DEVICE)
    table = torch.randn(max(num_tokens, 8), rotary, device=DEVICE, dtype=BF16)

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

    compiled = torch.compile(unfused) if GPU else unfused
    moved = 2 * qkv.numel() * qkv.itemsize
    return compare({"ours": seconds([ours] * 8), "native": seconds([lambda: compiled(qkv)] * 8)}, moved=moved)


@cache
def _experts() -> tuple[torch.Tensor, torch.Tensor]:
    w1 = torch.randn(512, 1024, 2048, device=DEVICE, dtype=BF16)
    return w1, torch.randn(512, 2048, 512, device=DEVICE, dtype=BF16)


def experts(batch: int) -> dict[str, Any]:
    """The routed experts of an 80B layer, which ours and the native model call alike: how near memory's limit."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    w1, w2 = _experts()
    x = torch.randn(batch, 2048, device=DEVICE, dtype=BF16)
    weights = torch.full((batch, 10), 0.1, device=DEVICE)
    routes = [torch.rand(batch, 512, device=DEVICE).topk(10, -1).indices.int() for _ in range(8)]
    each = [lambda ids=ids: fused_experts(x, w1, w2, weights, ids) for ids in routes]
    hit = statistics.mean(len(ids.unique()) for ids in routes)
    return compare({"ours": seconds(each)}, moved=hit * 3 * 512 * 2048 * BF16.itemsize)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deadline", type=float, default=time.time() + 600)
    args = parser.parse_args()
    report = Report("timing", args.out, args.deadline)
    batches = (1, 8, 64, 256) if args.quick or not GPU else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    lengths = (1024, 16384) if args.quick else (256, 1024, 4096, 16384, 65536)
    if not GPU:
        batches, lengths = (2,), (5,)
    report.run("ceilings", lambda: {"GB/s": reached().copy / 1e9, "TFLOP/s": reached().gemm / 1e12})
    for drafts in (0, 2):
        for batch in batches:
            what = f"verify {drafts} drafts, batch {batch}" if drafts else f"decode, batch {batch}"
            report.run(what, lambda b=batch, d=drafts: decode_step(b, d))
    for length in lengths:
        report.run(f"prefill {length}", lambda n=length: prefill(n))
    for num_tokens in (1, 64, 256, 4096) if GPU else (2,):
        report.run(f"attention prologue, {num_tokens} tokens", lambda n=num_tokens: prologue(n))
    for batch in (1, 8, 64, 256) if GPU else ():
        report.run(f"experts, batch {batch}", lambda b=batch: experts(b))
    for name, module, function, sizes in (
        ("flash-linear-attention", "fla", rule, (1024, 16384)),
        ("causal-conv1d", "causal_conv1d", convolution, (1, 64, 256)),
    ):
        try:
            __import__(module)
        except Exception as e:
            report.add(name, LEFT_OUT, reason=f"not importable: {type(e).__name__}: {e}"[:200])
            continue
        for size in sizes:
            report.run(f"{name}, {size}", lambda f=function, n=size: f(n))
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
