"""vLLM's GPU kernels for the flat layout: Triton convolution and decode, and the prefill backend vLLM selects."""

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import (
    fused_post_conv_prep,
    fused_recurrent_gated_delta_rule_packed_decode,
)
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd
from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from vllm_ext.kernels import record
from vllm_ext.state import conv_view

if TYPE_CHECKING:
    from vllm_ext.gated_delta_net import GatedDeltaNet


class GpuKernels:
    name = "triton"

    def __init__(self) -> None:
        self.chunk_gated_delta_rule = ChunkGatedDeltaRule()
        self.warm = False

    def prepare_weights(self, layer: "GatedDeltaNet") -> None:
        pass

    def warm_up(self, layer: "GatedDeltaNet", mixed_qkvz: torch.Tensor, ba: torch.Tensor) -> None:
        """Autotune and compile the prefill kernels while memory is still free: later the cache holds it all."""
        if self.warm:
            return
        self.warm = True
        dims, n = layer.dims, FLA_CHUNK_SIZE
        state = torch.zeros(
            (1, *layer.get_state_shape()[1]), dtype=layer.get_state_dtype()[1], device=mixed_qkvz.device
        )
        chunk = torch.tensor([0, n], dtype=torch.int32)
        self._prefill(
            layer,
            torch.randn(n, dims.conv_dim, dtype=mixed_qkvz.dtype, device=mixed_qkvz.device),
            torch.zeros(n, dims.num_v_heads, dtype=ba.dtype, device=ba.device),
            torch.zeros(n, dims.num_v_heads, dtype=ba.dtype, device=ba.device),
            state,
            chunk.to(mixed_qkvz.device),
            *self._chunk_metadata(chunk, mixed_qkvz.device),
        )

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
        conv_state, state = conv_view(layer.kv_cache[0]), layer.kv_cache[1]
        weight = layer.conv1d.weight.squeeze(1)
        slots = metadata.non_spec_state_indices_tensor
        if metadata.num_prefills == 0:
            # In a full CUDA graph the batch is padded: rows past the real ones carry the null slot.
            d = len(out)
            mixed = causal_conv1d_update(
                qkv, conv_state, weight, None, "silu", conv_state_indices=slots[:d], validate_data=False
            )
        else:
            d = metadata.num_decode_tokens
            mixed = causal_conv1d_fn(
                qkv.transpose(0, 1),
                weight,
                None,
                activation="silu",
                conv_states=conv_state,
                has_initial_state=metadata.has_initial_state,
                cache_indices=slots,
                query_start_loc=metadata.non_spec_query_start_loc,
                metadata=metadata,
            ).transpose(0, 1)
            prefill = metadata.prefill_state_indices
            initial = state[prefill]
            initial[~metadata.prefill_has_initial_state] = 0
            core, final = self._prefill(
                layer,
                mixed[d:],
                b[d:],
                a[d:],
                initial,
                metadata.prefill_query_start_loc,
                metadata.chunk_indices,
                metadata.chunk_offsets,
            )
            out[d:] = core
            state[prefill] = final.to(state.dtype)
            record(f"prefill: triton, {self.chunk_gated_delta_rule.gdn_prefill_backend}")
        if d:
            fused_recurrent_gated_delta_rule_packed_decode(
                mixed_qkv=mixed[:d],
                a=a[:d],
                b=b[:d],
                A_log=layer.A_log,
                dt_bias=layer.dt_bias,
                scale=layer.head_k_dim**-0.5,
                initial_state=state,
                out=out[:d].unsqueeze(1),
                ssm_state_indices=slots[:d],
                use_qk_l2norm_in_kernel=True,
            )
            record("decode: triton, packed")
        rows = out.view(-1, layer.head_v_dim)
        layer_norm_fwd(
            rows,
            layer.norm.weight,
            None,
            layer.norm.eps,
            z=z.reshape(-1, layer.head_v_dim),
            out=rows,
            norm_before_gate=True,
            is_rms_norm=True,
            activation=layer.norm.activation,
        )

    def _prefill(
        self,
        layer: "GatedDeltaNet",
        mixed: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        initial_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
        chunk_indices: torch.Tensor | None,
        chunk_offsets: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta = (
            x.unsqueeze(0)
            for x in fused_post_conv_prep(
                conv_output=mixed,
                a=a.contiguous(),
                b=b.contiguous(),
                A_log=layer.A_log,
                dt_bias=layer.dt_bias,
                num_k_heads=layer.dims.num_k_heads,
                head_k_dim=layer.head_k_dim,
                head_v_dim=layer.head_v_dim,
                apply_l2norm=True,
                output_g_exp=False,
            )
        )
        out, final_state = self.chunk_gated_delta_rule(
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

    def _chunk_metadata(
        self, cu_seqlens: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the metadata builder precomputes for a batch; only CuteDSL cannot do without."""
        if self.chunk_gated_delta_rule.gdn_prefill_backend != "cutedsl":
            return None, None
        from vllm.model_executor.layers.mamba.ops.gdn_chunk_cutedsl import prepare_metadata_cutedsl

        return prepare_metadata_cutedsl(cu_seqlens.to(device), FLA_CHUNK_SIZE)
