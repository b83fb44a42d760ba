"""vLLM's GPU kernels for the flat layout: convolution, packed decode, fused MTP decode and the prefill backends."""

import torch
from torch import Tensor
from vllm import _custom_ops as engine_ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.platforms import current_platform
from vllm.third_party.flash_linear_attention.ops import (
    fused_post_conv_prep,
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd
from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.kernel_log import record
from vllm_ext.compat import has_fused_mtp_decode
from vllm_ext.state import DeltaNetLayer, conv_view, state_dtypes


def fused_mtp_decode_obstacle(dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> str:
    """Return why vLLM's fused kernel (from the convolution's to the gated norm's output) cannot serve, or ""."""
    conv_dtype, recurrent_dtype = state_dtypes(vllm_config)
    dtypes = {vllm_config.model_config.dtype, conv_dtype}
    obstacles = {
        "VLLM_GDN_DECODE_KERNEL says otherwise": envs.VLLM_GDN_DECODE_KERNEL != "cuda",
        "it needs CUDA with capability 8.0": not (
            current_platform.is_cuda() and current_platform.has_device_capability(80)
        ),
        "this vLLM was built without it": not has_fused_mtp_decode(),
        "model and convolution cache have to be bfloat16": dtypes != {torch.bfloat16},
        f"it takes states in bfloat16 or float32, not {recurrent_dtype}": recurrent_dtype
        not in (torch.bfloat16, torch.float32),
        f"it takes heads of 128, not {dims.head_k_dim} and {dims.head_v_dim}": {dims.head_k_dim, dims.head_v_dim}
        != {128},
        f"it takes 1, 2, 3, 4 or 8 value heads a key head, not {dims.heads_per_group}": dims.heads_per_group
        not in (1, 2, 3, 4, 8),
        "it takes 1 to 7 drafts": not 0 < vllm_config.num_speculative_tokens < 8,
    }
    return "; ".join(text for text, holds in obstacles.items() if holds)


def torch_prefill_reason(dims: GatedDeltaNetDims, dtype: torch.dtype) -> str:
    """Return why ``qnext_plugin.ops`` computes prefills after vLLM's convolution; "" where vLLM's kernels do."""
    if dtype == torch.float32:
        return "vLLM's kernels take no float32"
    key, value = dims.head_k_dim, dims.head_v_dim
    if next_power_of_2(key) != next_power_of_2(value):
        # Its masks for keys and values share a name, so their shapes must agree, except in Triton's interpreter.
        return f"vLLM's fused_post_conv_prep does not compile for heads of {key} and {value}"
    return ""


class GpuKernels:
    """The kernels of Gated DeltaNet layers on GPUs.

    A full CUDA graph pads the batch: rows past the real ones carry the null slot, which kernels skip. The packed decode
    sets such rows to zero. The two kernels that verify drafts leave them unchanged, and they go on to the experts, so
    we set them to zero: they must not hold stale memory.
    """

    def __init__(self, dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> None:
        chunk = ChunkGatedDeltaRule()
        self.prefill, self.prefill_backend, self.prefill_obstacle = chunk, chunk.gdn_prefill_backend, ""
        if self.prefill_backend == "flashinfer" and not dims.head_k_dim == dims.head_v_dim == 128:
            self.prefill, self.prefill_backend = chunk.forward_native, "triton"
            self.prefill_obstacle = f"FlashInfer takes heads of 128, not {dims.head_k_dim} and {dims.head_v_dim}"
        reason = torch_prefill_reason(dims, vllm_config.model_config.dtype)
        if reason:
            self.prefill_backend, self.prefill_obstacle = "torch", reason
        self.obstacle = fused_mtp_decode_obstacle(dims, vllm_config)
        self.fused_mtp_decode = not self.obstacle
        self.warm = False

    def describe(self) -> dict[str, tuple[str, str]]:
        """Return for each phase the name that ``record`` will get, and why no faster kernel serves."""
        reason = f"no fused kernel: {self.obstacle}" if self.obstacle else "in a batch without prefills"
        return {
            "prefill": (f"triton, {self.prefill_backend}", self.prefill_obstacle),
            "decode": ("triton, triton", ""),
            "verify": ("triton, triton" if self.obstacle else "triton, cuda fused with the norm", reason),
        }

    def prepare_weights(self, layer: DeltaNetLayer) -> None:
        pass

    def warm_up(self, layer: DeltaNetLayer, mixed_qkvz: Tensor, ba: Tensor) -> None:
        """Autotune and compile the prefill kernels while memory is free; later the cache takes all of it."""
        if self.warm:
            return
        self.warm = True
        dims, n, device = layer.dims, FLA_CHUNK_SIZE, mixed_qkvz.device
        shape, dtype = layer.get_state_shape()[1], layer.get_state_dtype()[1]
        # FlashInfer has a kernel for few sequences and one for many.
        for num_sequences in (1, n) if self.prefill_backend == "flashinfer" else (1,):
            cu_seqlens = torch.arange(0, n + 1, n // num_sequences, dtype=torch.int32, device=device)
            indices = offsets = None
            if self.prefill_backend == "cutedsl":
                from vllm.model_executor.layers.mamba.ops.gdn_chunk_cutedsl import prepare_metadata_cutedsl

                indices, offsets = prepare_metadata_cutedsl(cu_seqlens, n)
            self._chunk(
                layer,
                torch.randn(n, dims.conv_dim, dtype=mixed_qkvz.dtype, device=device),
                torch.zeros(n, dims.num_v_heads, dtype=ba.dtype, device=device),
                torch.zeros(n, dims.num_v_heads, dtype=ba.dtype, device=device),
                torch.zeros(num_sequences, *shape, dtype=dtype, device=device),
                cu_seqlens,
                indices,
                offsets,
            )

    def run(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        qkv: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        if metadata.spec_sequence_masks is None:
            if metadata.num_prefills == 0:
                self._decode(layer, metadata, self._conv_update(layer, metadata, qkv), b, a, out)
            else:
                self._prefill(layer, metadata, qkv, b, a, out)
        elif metadata.num_prefills == 0:
            mixed = self._conv_verify(layer, metadata, qkv)
            if self.fused_mtp_decode:
                self._fused_verify(layer, metadata, mixed, z, b, a, out)
                return
            verified = self._verify(layer, metadata, mixed, b, a)
            padding = torch.arange(len(out), device=out.device) >= metadata.spec_query_start_loc[-1]
            out.copy_(verified.masked_fill_(padding[:, None, None], 0))
        else:
            rows, rest = metadata.spec_token_indx, metadata.non_spec_token_indx
            mixed = self._conv_verify(layer, metadata, qkv[rows])
            out[rows] = self._verify(layer, metadata, mixed, b[rows], a[rows])
            prefilled = out.new_empty(len(rest), *out.shape[1:])
            self._prefill(layer, metadata, qkv[rest], b[rest], a[rest], prefilled)
            out[rest] = prefilled
        flat = out.view(-1, layer.head_v_dim)
        layer_norm_fwd(
            flat,
            layer.norm.weight,
            None,
            layer.norm.eps,
            z=z.reshape(-1, layer.head_v_dim),
            out=flat,
            norm_before_gate=True,
            is_rms_norm=True,
            activation=layer.norm.activation,
        )

    def _conv_update(self, layer: DeltaNetLayer, metadata: GDNAttentionMetadata, qkv: Tensor) -> Tensor:
        return causal_conv1d_update(
            qkv,
            conv_view(layer.kv_cache[0]),
            layer.conv1d.weight.squeeze(1),
            None,
            "silu",
            conv_state_indices=metadata.non_spec_state_indices_tensor[: len(qkv)],
        )

    def _decode(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        mixed: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=mixed,
            a=a,
            b=b,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            scale=layer.head_k_dim**-0.5,
            initial_state=layer.kv_cache[1],
            out=out.unsqueeze(1),
            ssm_state_indices=metadata.non_spec_state_indices_tensor[: len(mixed)],
            use_qk_l2norm_in_kernel=True,
        )
        record("decode: triton, triton")

    def _prefill(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        qkv: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        """Compute prefills and, before them, the decodes of a mixed batch; both share one launch of the convolution."""
        mixed = causal_conv1d_fn(
            qkv.transpose(0, 1),
            layer.conv1d.weight.squeeze(1),
            None,
            activation="silu",
            conv_states=conv_view(layer.kv_cache[0]),
            has_initial_state=metadata.has_initial_state,
            cache_indices=metadata.non_spec_state_indices_tensor,
            query_start_loc=metadata.non_spec_query_start_loc,
            metadata=metadata,
        ).transpose(0, 1)
        d = metadata.num_decode_tokens
        if d:
            self._decode(layer, metadata, mixed[:d], b[:d], a[:d], out[:d])
        cache, slots = layer.kv_cache[1], metadata.prefill_state_indices
        state = cache[slots]
        state[~metadata.prefill_has_initial_state] = 0
        core, state = self._chunk(
            layer,
            mixed[d:],
            b[d:],
            a[d:],
            state,
            metadata.prefill_query_start_loc,
            metadata.chunk_indices,
            metadata.chunk_offsets,
        )
        out[d:] = core
        cache[slots] = state.to(cache.dtype)
        record(f"prefill: triton, {self.prefill_backend}")

    def _chunk(
        self,
        layer: DeltaNetLayer,
        mixed: Tensor,
        b: Tensor,
        a: Tensor,
        initial_state: Tensor,
        cu_seqlens: Tensor,
        chunk_indices: Tensor | None,
        chunk_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self.prefill_backend == "torch":
            q, k, v = ops.split_heads(mixed, layer.dims)
            g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
            out, final_state = ops.chunk_gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=initial_state.mT.float(), cu_seqlens=cu_seqlens
            )
            return out, final_state.mT
        prepared = fused_post_conv_prep(
            conv_output=mixed,
            a=a,
            b=b,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            num_k_heads=layer.dims.num_k_heads,
            head_k_dim=layer.head_k_dim,
            head_v_dim=layer.head_v_dim,
            apply_l2norm=True,
            output_g_exp=False,
        )
        q, k, v, g, beta = (x.unsqueeze(0) for x in prepared)
        out, final_state = self.prefill(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            chunk_offsets=chunk_offsets,
            use_qk_l2norm_in_kernel=False,
        )
        return out.squeeze(0), final_state

    def _conv_verify(self, layer: DeltaNetLayer, metadata: GDNAttentionMetadata, qkv: Tensor) -> Tensor:
        n, slots = metadata.num_spec_decodes, metadata.spec_state_indices_tensor
        return causal_conv1d_update(
            qkv,
            conv_view(layer.kv_cache[0]),
            layer.conv1d.weight.squeeze(1),
            None,
            "silu",
            conv_state_indices=slots[:n, 0],
            num_accepted_tokens=metadata.num_accepted_tokens[:n],
            query_start_loc=metadata.spec_query_start_loc[: n + 1],
            max_query_len=slots.shape[1],
        )

    def _verify(
        self, layer: DeltaNetLayer, metadata: GDNAttentionMetadata, mixed: Tensor, b: Tensor, a: Tensor
    ) -> Tensor:
        n = metadata.num_spec_decodes
        q, k, v = (x.unsqueeze(0) for x in ops.split_heads(mixed, layer.dims))
        out, _ = fused_sigmoid_gating_delta_rule_update(
            A_log=layer.A_log,
            a=a,
            b=b,
            dt_bias=layer.dt_bias,
            q=q,
            k=k,
            v=v,
            initial_state=layer.kv_cache[1],
            inplace_final_state=True,
            cu_seqlens=metadata.spec_query_start_loc[: n + 1],
            ssm_state_indices=metadata.spec_state_indices_tensor,
            num_accepted_tokens=metadata.num_accepted_tokens,
            use_qk_l2norm_in_kernel=True,
        )
        record("verify: triton, triton")
        return out.squeeze(0)

    def _fused_verify(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        n = metadata.num_spec_decodes
        out.zero_()
        engine_ops.fused_gdn_decode_post_conv_mtp(
            mixed_qkv=mixed,
            a=a,
            b=b,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            state_indices=metadata.spec_state_indices_tensor[:n].contiguous(),  # columns of a wider block table
            cu_seqlens=metadata.spec_query_start_loc[: n + 1],
            num_accepted_tokens=metadata.num_accepted_tokens[:n],
            state=layer.kv_cache[1],
            output_gate=z,
            norm_weight=layer.norm.weight,
            out=out,
            scale=layer.head_k_dim**-0.5,
            norm_eps=layer.norm.eps,
            output_gate_activation=layer.norm.activation,
        )
        record("verify: triton, cuda fused with the norm")
