"""vLLM's GPU kernels for the flat layout: convolution, packed decode, fused MTP decode and the prefill backends."""

import os

import torch
from torch import Tensor
from vllm import _custom_ops as engine_ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.platforms import current_platform
from vllm.third_party.flash_linear_attention.ops import (
    fused_recurrent_gated_delta_rule_packed_decode,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd
from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
from vllm.utils.math_utils import round_up
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.kernel_log import record
from qnext_plugin.ops import packages
from vllm_ext.compat import has_fused_mtp_decode
from vllm_ext.gpu_prefill import GpuPrefill, asked_packages, once
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


def check_asked_kernel(obstacle: str, num_drafts: int) -> None:
    """Raise ``ValueError`` if the environment names the fused kernel, which cannot serve these drafts."""
    if obstacle and num_drafts and os.environ.get("VLLM_GDN_DECODE_KERNEL", "").strip().lower() == "cuda":
        raise ValueError(f"VLLM_GDN_DECODE_KERNEL=cuda found, and vLLM's kernel cannot serve: {obstacle}; unset it")


class GpuKernels:
    """The kernels of Gated DeltaNet layers on GPUs.

    A full CUDA graph pads the batch: rows past the real ones carry the null slot, which kernels skip. The packed decode
    sets such rows to zero. The two kernels that verify drafts leave them unchanged, and they go on to the experts, so
    we set them to zero: they must not hold stale memory.
    """

    def __init__(self, dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> None:
        asked = asked_packages(vllm_config)
        self.prefill = GpuPrefill(dims, vllm_config, asked)
        self.convolution = "causal_conv1d" if "causal_conv1d" in asked else "triton"
        if self.convolution == "causal_conv1d":
            packages.load(self.convolution)
        self.obstacle = fused_mtp_decode_obstacle(dims, vllm_config)
        check_asked_kernel(self.obstacle, vllm_config.num_speculative_tokens)
        self.fused_mtp_decode = not self.obstacle
        self.warm = False

    @property
    def checkpoint_alignment(self) -> int | None:
        return self.prefill.checkpoint_alignment

    @property
    def checkpoint_grid(self) -> int | None:
        return self.prefill.checkpoint_grid

    def describe(self) -> dict[str, tuple[str, str]]:
        """Return for each phase the name that ``record`` will get, and why no faster kernel serves."""
        reason = f"no fused kernel: {self.obstacle}" if self.obstacle else "in a batch without prefills"
        return {
            "prefill": (f"{self.convolution}, {self.prefill.backend}", self.prefill.obstacle),
            "decode": ("triton, triton", ""),
            "verify": ("triton, triton" if self.obstacle else "triton, cuda fused with the norm", reason),
        }

    def prepare_weights(self, layer: DeltaNetLayer) -> None:
        pass

    def warm_up(self, layer: DeltaNetLayer, mixed_qkvz: Tensor, ba: Tensor) -> None:
        """Tune and compile kernels while memory is free; later the cache takes all of it."""
        if self.warm:
            return
        self.warm = True

        def inputs(n: int) -> tuple[Tensor, ...]:
            """Return q, k and v, z, b and a for ``n`` tokens, with the strides that they have in a batch."""
            return layer.split_inputs(*(x.new_zeros(n, x.shape[1]) for x in (mixed_qkvz, ba)))

        try:
            self.prefill.warm_up(layer, *inputs(FLA_CHUNK_SIZE))
        except Exception as e:
            raise RuntimeError(
                f"the {self.prefill.backend} kernel for prompts does not run on this GPU: {e}; "
                "choose another with --gdn-prefill-backend triton"
            ) from e
        # Triton compiles the norm for 1, 2 and 4 tokens in a block, again where 16 divides all tokens, and for a token.
        most = 2 * num_compute_units(mixed_qkvz.device.index)
        for n in (1, 2, 16, *(size for least in (most, 2 * most) for size in (least + 1, round_up(least + 1, 16)))):
            z = inputs(n)[1]
            self._norm(layer, z, torch.zeros_like(z, memory_format=torch.contiguous_format))
        torch.accelerator.empty_cache()

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
        self._norm(layer, z, out)

    def _norm(self, layer: DeltaNetLayer, z: Tensor, out: Tensor) -> None:
        """Apply the gated norm in place to ``out``; both are ``[num_tokens, num_v_heads, head_v_dim]``."""
        flat = out.flatten(1)
        layer_norm_fwd(
            flat,
            layer.norm.weight,
            None,
            layer.norm.eps,
            z=z.flatten(1),  # no copy: only tokens are strided
            out=flat,
            group_size=layer.head_v_dim,
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
        weight, states = layer.conv1d.weight.squeeze(1), conv_view(layer.kv_cache[0])
        slots, starts = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
        if self.convolution == "causal_conv1d":
            mixed = packages.causal_conv1d_in_slots(qkv, weight, states, slots, metadata.has_initial_state, starts)
        else:
            mixed = causal_conv1d_fn(
                qkv.transpose(0, 1),
                weight,
                None,
                activation="silu",
                conv_states=states,
                has_initial_state=metadata.has_initial_state,
                cache_indices=slots,
                query_start_loc=starts,
                metadata=metadata,
            ).transpose(0, 1)
        d = metadata.num_decode_tokens
        if d:
            self._decode(layer, metadata, mixed[:d], b[:d], a[:d], out[:d])
        self.prefill.run(layer, metadata, qkv, mixed, b, a, out)
        record(f"prefill: {self.convolution}, {self.prefill.backend}")

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
        n, slots = metadata.num_spec_decodes, metadata.spec_state_indices_tensor
        out.zero_()
        engine_ops.fused_gdn_decode_post_conv_mtp(
            mixed_qkv=mixed,
            a=a,
            b=b,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            state_indices=once(metadata, "verified_slots", slots[:n].contiguous),  # columns of a wider block table
            cu_seqlens=metadata.spec_query_start_loc[: n + 1],
            num_accepted_tokens=metadata.num_accepted_tokens[:n],
            state=layer.kv_cache[1],
            output_gate=z,
            norm_weight=layer.norm.weight[: layer.head_v_dim],
            out=out,
            scale=layer.head_k_dim**-0.5,
            norm_eps=layer.norm.eps,
            output_gate_activation=layer.norm.activation,
        )
        record("verify: triton, cuda fused with the norm")
