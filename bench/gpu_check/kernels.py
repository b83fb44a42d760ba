"""Every GPU kernel that a Gated DeltaNet layer calls, and ``qnext_plugin.ops``, against the float64 oracle:
``python -m bench.gpu_check.kernels [--quick] [--out FILE] [--deadline UNIX-TIME]``.

Without a GPU, vLLM's Triton kernels run in Triton's interpreter, on few and small shapes.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.report import LEFT_OUT, Report

if not torch.cuda.is_available():
    from bench.gpu_check import interpreter

    interpreter.enable()

from bench.gpu_check.layer import Layer, OneLaunch, Turn
from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.kernel_log import KERNELS_RAN
from qnext_plugin.reference import formulas
from tests.support.tolerances import LAYER, OPS, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN3_NEXT = GatedDeltaNetDims(16, 32, 128, 128)
UNEQUAL = GatedDeltaNetDims(2, 6, 128, 128)
ODD = GatedDeltaNetDims(2, 6, 48, 80)
SMALL = GatedDeltaNetDims(1, 3, 16, 24)
BF16, F32 = torch.bfloat16, torch.float32


def grow(layer: Layer, lengths: list[int]) -> dict[str, Any]:
    """Prefills of ``lengths``, decodes, decodes and new prefills in one batch, chunked prefills, reused slots."""
    tolerance, errors = LAYER[layer.dtype], []
    old = [layer.request() for _ in lengths]
    errors.append(layer.step([Turn(r, n) for r, n in zip(old, lengths, strict=True)], tolerance))
    errors.append(layer.step([Turn(r) for r in old], tolerance))
    new = layer.request()
    errors.append(layer.step([*(Turn(r) for r in old), Turn(new, lengths[-1])], tolerance))
    errors.append(layer.step([*(Turn(r) for r in old[1:]), Turn(new, 3), Turn(old[0], 2)], tolerance))
    layer.release(old[0])
    errors.append(layer.step([Turn(old[1]), Turn(layer.request(), 1), Turn(layer.request(), 2)], tolerance))
    if layer.full_graph:
        errors.append(layer.step([Turn(r) for r in old[1:]], tolerance, padded=3))
    return {"error": max(errors)}


def draft(layer: Layer, lengths: list[int], rounds: int) -> dict[str, Any]:
    """Drafts accepted in every number, ragged, with prompts beside them, and in a padded batch."""
    tolerance, errors, most = LAYER[layer.dtype], [], layer.num_drafts
    requests = [layer.request() for _ in lengths]
    errors.append(layer.step([Turn(r, n) for r, n in zip(requests, lengths, strict=True)], tolerance))
    for i in range(rounds):
        turns = [Turn(r, drafts=most, accepted=1 + (i + j) % (1 + most)) for j, r in enumerate(requests)]
        errors.append(layer.step(turns, tolerance, padded=2 if layer.full_graph and i == 1 else 0))
    ragged = [Turn(r, drafts=j % (1 + most), accepted=1 + j % (1 + most)) for j, r in enumerate(requests)]
    errors.append(layer.step(ragged, tolerance))
    new = layer.request()
    turns = [Turn(r, drafts=most, accepted=1 + j % 2) for j, r in enumerate(requests)]
    errors.append(layer.step([*turns, Turn(new, lengths[0])], tolerance))
    last = [Turn(r, drafts=most, accepted=1 + most) for r in [*requests, new]]
    errors.append(layer.step(last, tolerance))
    return {"error": max(errors)}


def served(function: Any, *args: Any) -> dict[str, Any]:
    KERNELS_RAN.clear()
    return {**function(*args), "kernels": "; ".join(sorted(KERNELS_RAN))}


def layers(report: Report, quick: bool) -> None:
    """The most telling first: real dimensions, then odd ones."""
    if DEVICE == "cpu":
        cases: Any = [(SMALL, BF16, "float32", False), (SMALL, F32, "float32", True)]
        lengths, rounds, backends = [5, 67], 2, ["triton"]
    else:
        cases = [
            (dims, dtype, state, graph)
            for dims, (dtype, state), graph in product(
                (QWEN3_NEXT, UNEQUAL, ODD),
                ((BF16, "float32"), (BF16, "bfloat16"), (F32, "float32")),
                (True, False),
            )
        ]
        if quick:
            cases = cases[:4]
        lengths, rounds, backends = [1, 5, 64, 67, 130, 3], 4, ["triton"]
    for dims, dtype, state, graph in cases:
        heads = f"{dims.num_k_heads}/{dims.num_v_heads}x{dims.head_k_dim}/{dims.head_v_dim}"
        name = f"{heads} {str(dtype)[6:]}, state {state}{', full graphs' if graph else ''}"
        more: dict[str, Any] = {"dims": dims, "dtype": dtype, "state_dtype": state, "full_graph": graph}
        for backend in backends:
            report.run(f"{backend} {name}", lambda b=backend, m=more: served(grow, layer(backend=b, **m), lengths))
        for drafts in (2,) if DEVICE == "cpu" else (1, 2, 3, 7):
            report.run(
                f"{drafts} drafts {name}",
                lambda n=drafts, m=more: served(draft, layer(num_drafts=n, **m), lengths, rounds),
            )
    one_launch(report, lengths, rounds)
    if DEVICE == "cuda":
        triton_verify(report, lengths, rounds)
        for backend in ("flashinfer", "auto"):  # compiled on first use, which may take long or have no compiler
            more = {"dims": QWEN3_NEXT, "dtype": BF16}
            report.run(f"{backend} 80B", lambda b=backend, m=more: served(grow, layer(backend=b, **m), lengths))
    else:
        report.add("fused CUDA kernel for drafts", LEFT_OUT, reason="no GPU")
        report.add("FlashInfer prefill", LEFT_OUT, reason="no GPU")


def layer(**arguments: Any) -> Layer:
    return Layer(device=DEVICE, **arguments)


def one_launch(report: Report, lengths: list[int], rounds: int) -> None:
    """``ops.triton_step``, which nothing serves with yet."""
    shapes = (SMALL,) if DEVICE == "cpu" else (QWEN3_NEXT, ODD)
    for dims, (dtype, state) in product(shapes, ((BF16, "bfloat16"), (F32, "float32"))):
        more: dict[str, Any] = {"dims": dims, "dtype": dtype, "state_dtype": state, "full_graph": True}
        more["kernels"] = OneLaunch
        name = f"one launch {dims.head_k_dim}/{dims.head_v_dim} {str(dtype)[6:]}"
        report.run(f"{name}, decode", lambda m=more: served(grow, layer(**m), lengths))
        report.run(f"{name}, 3 drafts", lambda m=more: served(draft, layer(num_drafts=3, **m), lengths, rounds))


def triton_verify(report: Report, lengths: list[int], rounds: int) -> None:
    """What verifies where the fused kernel does not serve, on dimensions where it does."""

    def check() -> dict[str, Any]:
        made = layer(dims=QWEN3_NEXT, dtype=BF16, num_drafts=2, full_graph=True)
        made.layer.kernels.fused_mtp_decode = False
        return served(draft, made, lengths, rounds)

    report.run("2 drafts, Triton kernels", check)


def functions(report: Report, quick: bool) -> None:
    """``qnext_plugin.ops`` on this device."""
    for dtype in (F32, BF16):
        report.run(f"ops {str(dtype)[6:]}", lambda d=dtype: operators(d))


def operators(dtype: torch.dtype) -> dict[str, Any]:
    dims, lengths = GatedDeltaNetDims(2, 6, 24, 40), [1, 63, 0, 130]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    total, n = sum(lengths), len(lengths)
    q, k = (random(total, dims.num_k_heads, dims.head_k_dim) for _ in range(2))
    v = random(total, dims.num_v_heads, dims.head_v_dim)
    a, b = random(total, dims.num_v_heads), random(total, dims.num_v_heads)
    A_log, dt_bias = random(dims.num_v_heads, dtype=F32), random(dims.num_v_heads)
    state = random(n, dims.num_v_heads, dims.head_k_dim, dims.head_v_dim, dtype=F32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    q, k, v, a, b, A_log, dt_bias, state, cu_seqlens = (
        x.to(DEVICE) for x in (q, k, v, a, b, A_log, dt_bias, state, cu_seqlens)
    )
    g, beta = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
    out, final = ops.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=cu_seqlens)
    gates = formulas.gating(*(x.cpu().double() for x in (a, b, A_log, dt_bias)))
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        if start == end:
            continue
        rows = slice(start, end)
        qkv = (x[rows].cpu().double() for x in (q, k, v))
        expected, states = formulas.gated_delta_rule(*qkv, *(x[rows] for x in gates), state[i].cpu().double())
        assert_close(out[rows].cpu(), expected, OPS[dtype], f"sequence of {end - start}")
        assert_close(final[i].cpu(), states[-1], OPS[dtype], f"state after {end - start}")
    weight, eps = random(dims.head_v_dim).to(DEVICE), 1e-6
    z = random(total, dims.num_v_heads, dims.head_v_dim).to(DEVICE)
    expected = formulas.rms_norm_gated(*(x.cpu().double() for x in (v, z, weight)), eps)
    assert_close(ops.rms_norm_gated(v, z, weight, eps).cpu(), expected, OPS[dtype], "gated norm")
    return {}


def prologue(report: Report) -> None:
    """vLLM's fused split, QK norm, partial RoPE and gate of the attention layers."""
    from vllm.model_executor.layers.fused_qk_norm_rope import fused_qk_rmsnorm_rope_gate

    heads, kv_heads, dim, rotary = (16, 2, 256, 64) if DEVICE == "cuda" else (3, 1, 24, 8)

    def check(num_tokens: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        width = (2 * heads + 2 * kv_heads) * dim
        qkv = torch.randn(num_tokens, width, generator=generator).to(BF16)
        q_weight, k_weight = 0.1 * torch.randn(2, dim, generator=generator).to(BF16)
        positions = torch.randint(0, 512, (num_tokens,), generator=generator)
        frequencies, _ = formulas.rope_frequencies({"rope_type": "default", "rope_theta": 1e7}, rotary, torch.float64)
        angles = torch.arange(512, dtype=torch.float64)[:, None] * frequencies
        table = torch.cat([angles.cos(), angles.sin()], -1)
        q_gate, k, _ = qkv.to(DEVICE).split([2 * heads * dim, kv_heads * dim, kv_heads * dim], -1)
        weights = (q_weight.to(DEVICE), k_weight.to(DEVICE))
        found = fused_qk_rmsnorm_rope_gate(
            q_gate, k, *weights, table.to(DEVICE, BF16), positions.to(DEVICE), 1e-6, heads, kv_heads, dim, rotary,
            norm_beta=1.0,
        )  # fmt: skip
        q, gate = q_gate.cpu().double().unflatten(-1, (heads, 2, dim)).unbind(-2)
        cos, sin = table.to(BF16).double()[positions].chunk(2, -1)
        expected = []
        for x, weight in ((q, q_weight), (k.cpu().double().unflatten(-1, (kv_heads, dim)), k_weight)):
            normed = formulas.zero_centered_rms_norm(x, weight.double(), 1e-6)
            expected.append(formulas.rotate(normed, cos, sin).flatten(-2))
        for name, actual, want in zip(("q", "k", "gate"), found, (*expected, gate.flatten(-2)), strict=True):
            assert_close(actual.cpu(), want, OPS[BF16], name)
        return {}

    for num_tokens in (1, 5) if DEVICE == "cpu" else (1, 5, 257):
        report.run(f"attention prologue, {num_tokens} tokens", lambda n=num_tokens: check(n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deadline", type=float, default=time.time() + 600)
    args = parser.parse_args()
    report = Report("kernels", args.out, args.deadline)
    layers(report, args.quick)
    functions(report, args.quick)
    prologue(report)
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
