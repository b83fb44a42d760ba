"""How long operators of a layer take, and what vLLM's own Qwen3-Next would run in their place."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule, QwenGatedDeltaNetAttention
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd

from qnext_plugin.bench import ceilings
from qnext_plugin.bench.ceilings import Ceilings
from tests.gpu.layer import PREFIX, Layer
from tests.gpu.turns import Request, Turn

torch._dynamo.config.suppress_errors = True
GPU = torch.cuda.is_available()
Call = Callable[[], Any]


def seconds(calls: Sequence[Call], graph: bool = True, rounds: int = 9) -> float:
    """Median time of one of ``calls``, which do the same on different data.

    On a GPU it is that of a CUDA graph of them, so that no launch counts, or of eager calls; between CUDA events.
    """
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
    return ceilings.measure(torch.bfloat16, "cuda")


def compare(times: dict[str, float], moved: float = 0.0, flops: float = 0.0) -> dict[str, Any]:
    """``times`` in seconds by name, ours first, and how ours does.

    A rate is what has to be ``moved`` (bytes) or computed (``flops``) over that time, ``of_peak`` that over what a copy
    or a matrix product reaches on this GPU.
    """
    found: dict[str, Any] = {f"{name}_us": t * 1e6 for name, t in times.items()}
    ours = times["ours"]
    others = {name: t for name, t in times.items() if name != "ours"}
    if "native" in times:
        found["speedup"] = times["native"] / ours
    if others:
        found["best_other"] = min(others, key=others.__getitem__)
    if moved and GPU:
        found |= {"GB/s": moved / ours / 1e9, "of_peak": moved / ours / reached().copy}
    if flops and GPU:
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


def calls(made: Layer, batches: Sequence[Sequence[Turn]]) -> dict[str, list[Call]]:
    """The layer between its projections, ours and native, on each of ``batches``."""
    dims, layer, native = made.dims, made.layer, native_layer(made)
    like = {"device": made.device, "dtype": made.dtype}

    def inputs(mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, z, b, a = native.fix_query_key_value_ordering(mixed_qkvz, ba)
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], -1), z, b.contiguous(), a.contiguous()

    # As in the engine, which compiles what surrounds its kernels.
    inputs = torch.compile(inputs, dynamic=True) if GPU else inputs
    found: dict[str, list[Call]] = {"ours": [], "native": []}
    for batch in batches:
        metadata = made.metadata(batch)
        if metadata.spec_state_indices_tensor is not None:  # as the builder leaves it for full graphs
            metadata.spec_state_indices_tensor = metadata.spec_state_indices_tensor.contiguous()
        n = sum(turn.length for turn in batch)
        mixed = torch.randn(n, dims.conv_dim + dims.value_dim, **like)
        ba = torch.randn(n, 2 * dims.num_v_heads, **like)
        out = torch.empty(n, dims.num_v_heads, dims.head_v_dim, **like)

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
                    flat, layer.norm.weight[: dims.head_v_dim], None, layer.norm.eps,
                    z=z.reshape(-1, dims.head_v_dim), out=flat,
                    is_rms_norm=True, activation="silu",
                )  # fmt: skip

        found["ours"].append(ours)
        found["native"].append(theirs)
    return found


def request(made: Layer) -> Request:
    """A request that has computed one token."""
    new = made.request()
    new.tokens = torch.zeros(1, *new.tokens.shape[1:], dtype=made.dtype)
    return new
