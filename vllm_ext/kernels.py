"""Which kernel serves a Gated DeltaNet layer, and the CPU kernels.

========  ===========================================  ==========================================================
device    condition                                    serves
========  ===========================================  ==========================================================
GPU       any                                          ``gpu_kernels``: vLLM's Triton, FlashInfer and CuteDSL ones
CPU       conv: bfloat16, width 4, AVX512-BF16 or Arm  ``cpp``: vLLM's C++ convolution
CPU       delta: bfloat16, K = V in (64, 128)          ``cpp``: vLLM's C++ delta rule
CPU       otherwise, each on its own                   ``torch``: ``qnext_plugin.ops``, any dtype and dimensions
========  ===========================================  ==========================================================
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm import _custom_ops as engine_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn  # noqa: F401  registers the op that calls us
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from vllm_ext.state import conv_view

if TYPE_CHECKING:
    from vllm_ext.gated_delta_net import GatedDeltaNet

KERNELS_RAN: set[str] = set()
"""``"phase: convolution, delta rule"`` of everything that has served in this process."""


def record(what: str) -> None:
    KERNELS_RAN.add(what)


class Kernels(Protocol):
    """From the two projections to the input of ``out_proj``."""

    def prepare_weights(self, layer: "GatedDeltaNet") -> None: ...

    def warm_up(self, layer: "GatedDeltaNet", mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> None: ...

    def run(
        self,
        layer: "GatedDeltaNet",
        metadata: GDNAttentionMetadata,
        qkv: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        out: torch.Tensor,
    ) -> None: ...


def select_kernels(dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> Kernels:
    """The kernels for a layer whose rank holds ``dims``."""
    if not current_platform.is_cpu():
        from vllm_ext.gpu_kernels import GpuKernels

        return GpuKernels()
    bfloat16 = vllm_config.model_config.dtype == torch.bfloat16
    arm = current_platform.get_cpu_architecture() == CpuArchEnum.ARM
    conv = (
        bfloat16
        and dims.conv_kernel_size == 4
        and not is_conv_state_dim_first()
        and (torch.cpu.get_capabilities().get("bf16", False) if arm else torch.cpu._is_avx512_bf16_supported())
    )
    delta = bfloat16 and dims.head_k_dim == dims.head_v_dim and dims.head_k_dim in (64, 128)
    return CpuKernels(CppConv() if conv else TorchConv(), CppDelta() if delta else TorchDelta())


class CpuKernels:
    """Decode tokens come first in a batch, prefills after them; each goes through its convolution and delta rule."""

    def __init__(self, conv: "CppConv | TorchConv", delta: "CppDelta | TorchDelta") -> None:
        self.conv, self.delta = conv, delta

    def prepare_weights(self, layer: "GatedDeltaNet") -> None:
        self.conv.prepare_weights(layer)

    def warm_up(self, layer: "GatedDeltaNet", mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> None:
        pass

    def run(
        self,
        layer: "GatedDeltaNet",
        metadata: GDNAttentionMetadata,
        qkv: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        n, d = metadata.num_decodes, metadata.num_decode_tokens
        if n:
            slots = metadata.non_spec_state_indices_tensor[:n]
            mixed = self.conv.decode(layer, qkv[:d], slots)
            out[:d] = self.delta.decode(layer, mixed, b[:d], a[:d], slots)
            record(f"decode: {self.conv.name}, {self.delta.name}")
        if metadata.num_prefills:
            n = metadata.num_prefills
            batch: dict[str, Any] = {
                "slots": metadata.prefill_state_indices[:n],
                "has_state": metadata.prefill_has_initial_state[:n],
                "cu_seqlens": metadata.prefill_query_start_loc[: n + 1],
            }
            # Decode moves a sequence by one token; a first chunk must not see what the slot held before.
            mixed = self.conv.prefill(layer, qkv[d:], **batch)
            out[d:] = self.delta.prefill(layer, mixed, b[d:], a[d:], **batch)
            record(f"prefill: {self.conv.name}, {self.delta.name}")
        out.copy_(ops.rms_norm_gated(out, z, layer.norm.weight, layer.norm.eps))


class TorchConv:
    name = "torch"

    def prepare_weights(self, layer: "GatedDeltaNet") -> None:
        pass

    def decode(self, layer: "GatedDeltaNet", x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        state = conv_view(layer.kv_cache[0])
        out, state[slots] = ops.causal_conv1d_update(x, layer.conv1d.weight.squeeze(1), conv_state=state[slots])
        return out

    def prefill(
        self,
        layer: "GatedDeltaNet",
        x: torch.Tensor,
        slots: torch.Tensor,
        has_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        cache = conv_view(layer.kv_cache[0])
        state = torch.where(has_state[:, None, None], cache[slots], 0)
        out, cache[slots] = ops.causal_conv1d(
            x, layer.conv1d.weight.squeeze(1), conv_state=state, cu_seqlens=cu_seqlens
        )
        return out


class CppConv:
    name = "cpp"

    def prepare_weights(self, layer: "GatedDeltaNet") -> None:
        weight = layer.conv1d.weight.squeeze(1).contiguous()
        layer.packed_conv_weight = engine_ops.causal_conv1d_weight_pack(weight)

    def decode(self, layer: "GatedDeltaNet", x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return engine_ops.causal_conv1d_update_cpu(
            x=x.contiguous(),
            conv_states=layer.kv_cache[0].transpose(1, 2),
            weight=layer.packed_conv_weight,
            bias=None,
            silu_activation=True,
            conv_state_indices=slots,
            is_weight_packed=True,
        )

    def prefill(
        self,
        layer: "GatedDeltaNet",
        x: torch.Tensor,
        slots: torch.Tensor,
        has_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        return engine_ops.causal_conv1d_fwd_cpu(
            x=x.contiguous().transpose(0, 1),
            weight=layer.packed_conv_weight,
            bias=None,
            conv_states=layer.kv_cache[0].transpose(1, 2),
            query_start_loc=cu_seqlens,
            cache_indices=slots,
            has_initial_state=has_state,
            silu_activation=True,
            is_weight_packed=True,
        ).transpose(0, 1)


class TorchDelta:
    name = "torch"

    def decode(
        self, layer: "GatedDeltaNet", mixed: torch.Tensor, b: torch.Tensor, a: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        cache = layer.kv_cache[1]
        q, k, v = split_heads(layer.dims, mixed)
        g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
        out, state = ops.recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=cache[slots].float())
        cache[slots] = state.to(cache.dtype)
        return out

    def prefill(
        self,
        layer: "GatedDeltaNet",
        mixed: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        slots: torch.Tensor,
        has_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        cache = layer.kv_cache[1]
        q, k, v = split_heads(layer.dims, mixed)
        g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
        state = torch.where(has_state[:, None, None, None], cache[slots], 0).float()
        out, state = ops.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=cu_seqlens)
        cache[slots] = state.to(cache.dtype)
        return out


class CppDelta:
    name = "cpp"

    def decode(
        self, layer: "GatedDeltaNet", mixed: torch.Tensor, b: torch.Tensor, a: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.unsqueeze(0) for x in split_heads(layer.dims, mixed))
        return engine_ops.fused_sigmoid_gating_delta_rule_update_cpu(
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            q=q,
            k=k,
            v=v,
            a=a.contiguous(),
            b=b.contiguous(),
            initial_state_source=layer.kv_cache[1],
            initial_state_indices=slots,
            cu_seqlens=torch.arange(len(slots) + 1, dtype=torch.int32),
            use_qk_l2norm_in_kernel=True,
        ).squeeze(1)

    def prefill(
        self,
        layer: "GatedDeltaNet",
        mixed: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        slots: torch.Tensor,
        has_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = (x.unsqueeze(0) for x in split_heads(layer.dims, mixed))
        g, beta = engine_ops.fused_gdn_gating_cpu(
            A_log=layer.A_log, a=a.contiguous(), b=b.contiguous(), dt_bias=layer.dt_bias
        )
        cache = layer.kv_cache[1]
        cache[slots[~has_state]] = 0
        out, _ = engine_ops.chunk_gated_delta_rule_cpu(
            query=q,
            key=k,
            value=v,
            g=g,
            beta=beta,
            initial_state=cache,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            head_first=False,
            use_qk_l2norm_in_kernel=True,
            initial_state_indices=slots,
            eps=1e-6,
        )
        return out.squeeze(0)


def split_heads(dims: GatedDeltaNetDims, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views ``q, k [num_tokens, num_k_heads, head_k_dim]`` and ``v [num_tokens, num_v_heads, head_v_dim]``."""
    q, k, v = mixed.split([dims.key_dim, dims.key_dim, dims.value_dim], dim=-1)
    return (
        q.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        k.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        v.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)),
    )
