"""What C++ operators that SGLang's layers call demand and return; those that return nothing need no entry."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.dry import deep_gemm, scales
from tests.gpu.dry.trace import TRACE

FAKES: dict[str, Callable[..., Any]] = dict(deep_gemm.FAKES)
HALVES = (torch.bfloat16, torch.float16)


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FAKES[name] = function
        return function

    return register


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"contract: {message}")


@operator("sgl_kernel::weak_ref_tensor")
def weak_ref_tensor(tensor: Tensor) -> Tensor:
    return tensor


@operator("sgl_kernel::fwd")
def flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any, v_new: Any, q_v: Any, out: Any, cu_seqlens_q: Any, *more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashAttention 3 takes vectors of 16 bytes, head sizes in multiples of 8 up to 256, and int32 offsets."""
    names = ("cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k", "max_q", "max_k", "page_table")
    if k.dtype == torch.float8_e4m3fn:
        scales.use("attention", k.dtype, *more[13:15])
    offsets = {"cu_seqlens_q": cu_seqlens_q} | dict(zip(names, more, strict=False))
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dtype in (*HALVES, torch.float8_e4m3fn), f"FlashAttention 3 takes no {x.dtype} {name}")
        require(x.stride(-1) == 1, f"FlashAttention 3 wants {name} contiguous in its last dimension: {x.stride()}")
        require(x.data_ptr() % 16 == 0, f"FlashAttention 3 wants {name} aligned to 16 bytes")
    require(q.dtype == k.dtype == v.dtype, "FlashAttention 3 wants one type")
    require(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"FlashAttention 3 takes no heads of {q.shape[-1]}")
    require(q.shape[-2] % k.shape[-2] == 0, f"{q.shape[-2]} heads on {k.shape[-2]}")
    for name, x in offsets.items():
        if isinstance(x, Tensor):
            require(x.dtype == torch.int32, f"FlashAttention 3 wants {name} in int32, not {x.dtype}")
            require(x.device.type == "cuda", f"FlashAttention 3 wants {name} on the GPU")
            require(x.stride(-1) == 1, f"FlashAttention 3 wants {name} contiguous")
    tokens, heads = q.shape[:-2], q.shape[-2]
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    result = out if out is not None else q.new_empty(*tokens, heads, v.shape[-1], dtype=dtype)
    return result, q.new_empty(heads, *tokens, dtype=torch.float32), *(q.new_empty(0, dtype=torch.float32),) * 2


@operator("sgl_kernel::get_scheduler_metadata")
def get_scheduler_metadata(batch: int, *more: Any) -> Tensor:
    lengths = more[7]
    require(lengths.dtype == torch.int32, f"FlashAttention 3 wants sequence lengths in int32, not {lengths.dtype}")
    return torch.empty(1 + -(-batch // 4) * 16, dtype=torch.int32, device=lengths.device)


def watch_cache() -> None:
    """Note the scales that SGLang's cache is given with keys and values, and for which layer it and attention run."""
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    write = MHATokenToKVPool.set_kv_buffer

    def watched(
        self: Any, layer: Any, loc: Any, k: Tensor, v: Tensor, k_scale: Any = None, v_scale: Any = None, **more: Any
    ) -> None:
        if self.dtype == torch.float8_e4m3fn:
            scales.use("write", self.dtype, k_scale, v_scale)
        write(self, layer, loc, k, v, k_scale, v_scale, **more)

    MHATokenToKVPool.set_kv_buffer = watched

    def named(name: str) -> None:
        run = getattr(FlashAttentionBackend, name)

        def of_layer(self: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, *args: Any, **more: Any) -> Any:
            scales.LAYERS.append(TRACE.names[id(layer)])
            try:
                return run(self, q, k, v, layer, *args, **more)
            finally:
                scales.LAYERS.pop()

        setattr(FlashAttentionBackend, name, of_layer)

    named("forward_extend")
    named("forward_decode")


def guard_kernels() -> None:
    """Hold what Python hands to Triton kernels to what these take for granted: they read rows by one stride."""
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_triton

    def guarded(module: Any, name: str, *rows: str) -> None:
        original = getattr(module, name)
        signature = inspect.signature(original)

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            for row in rows:
                require(given[row].stride(-1) == 1, f"{name} wants rows of {row} contiguous: {given[row].stride()}")
            return original(*args, **kwargs)

        setattr(module, name, checked)

    guarded(gdn_triton, "fused_sigmoid_gating_delta_rule_update", "q", "k", "v", "a", "b")
    guarded(gdn_backend, "fused_gdn_gating", "a", "b")
