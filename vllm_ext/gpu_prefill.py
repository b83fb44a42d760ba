"""The delta rule of prompts on GPUs: FlashInfer's kernel on the states where they are, other kernels, or torch.

With prefix caching, FlashInfer's kernel also returns states in the middle of a prompt. The scheduler then need not end
a step where a prefix is to be cached.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.checkpoint import MambaPrefillCheckpointExporter
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule
from vllm.third_party.flash_linear_attention.ops import fused_post_conv_prep
from vllm.third_party.flash_linear_attention.ops.index import prepare_chunk_indices
from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
from vllm.utils.math_utils import cdiv, next_power_of_2
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID
from vllm.v1.worker.workspace import current_workspace_manager

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.ops import packages
from vllm_ext import compat
from vllm_ext.state import DeltaNetLayer, conv_view


def once(metadata: GDNAttentionMetadata, name: str, make: Callable[[], Tensor]) -> Tensor:
    """Return what ``make`` returned for this step's ``metadata`` when it was first asked for ``name``.

    Layers of the same group share the metadata.
    """
    found = metadata.__dict__.get(name)
    if found is None:
        found = metadata.__dict__[name] = make()
    return found


def torch_prefill_reason(dims: GatedDeltaNetDims, dtype: torch.dtype) -> str:
    """Return why ``qnext_plugin.ops`` computes prefills after vLLM's convolution; "" where vLLM's kernels do."""
    if dtype == torch.float32:
        return "vLLM's kernels take no float32"
    key, value = dims.head_k_dim, dims.head_v_dim
    if next_power_of_2(key) != next_power_of_2(value):
        # Its masks for keys and values share a name, so their shapes must agree, except in Triton's interpreter.
        return f"vLLM's fused_post_conv_prep does not compile for heads of {key} and {value}"
    return ""


def flashinfer_prefill() -> Callable[..., Any] | None:
    """Return FlashInfer's prefill if it reads and writes states in a cache, as from version 0.7 on; else None."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    needed = {"output", "output_state", "state_indices", "state_checkpoints", "use_cp"}
    return chunk_gated_delta_rule if needed <= signature(chunk_gated_delta_rule).parameters.keys() else None


def asked_packages(vllm_config: VllmConfig) -> tuple[str, ...]:
    """Return the packages that ``gdn_prefill_backend`` of ``--additional-config`` names, which vLLM reads as Triton."""
    more = vllm_config.additional_config
    return packages.asked(more.get("gdn_prefill_backend")) if isinstance(more, dict) else ()


class GpuPrefill:
    """The prefill of Gated DeltaNet layers. ``asked`` names the packages whose operators the user wants.

    ``backend`` is the kernel that serves, ``obstacle`` why not a faster one. ``checkpoint_alignment`` is the number of
    tokens at whose multiples the kernel can return states, or None; ``checkpoint_grid`` the one at whose multiples
    vLLM asks for them, or None.
    """

    def __init__(self, dims: GatedDeltaNetDims, vllm_config: VllmConfig, asked: Sequence[str]) -> None:
        self._vllm_config, vllms = vllm_config, ChunkGatedDeltaRule()
        self._built_for = self.backend = vllms.gdn_prefill_backend
        self._flashinfer: Callable[..., Any] | None = None
        self._chunk: Callable[..., Any] = vllms
        self.obstacle = torch_prefill_reason(dims, vllm_config.model_config.dtype)
        self.checkpoint_alignment: int | None = None
        if self.obstacle:
            self.backend = "torch"
        elif "fla" in asked:
            packages.load("fla")
            self._chunk, self.backend = packages.chunk_gated_delta_rule, "fla"
        elif self.backend == "flashinfer" and not dims.head_k_dim == dims.head_v_dim == 128:
            self._chunk, self.backend = vllms.forward_native, "triton"
            self.obstacle = f"FlashInfer takes heads of 128, not {dims.head_k_dim} and {dims.head_v_dim}"
        elif self.backend == "flashinfer":
            self._flashinfer = flashinfer_prefill()
            if self._flashinfer is not None and vllm_config.cache_config.mamba_cache_mode == "align":
                self.checkpoint_alignment = compat.prefill_checkpoint_alignment()

    @cached_property
    def checkpoint_grid(self) -> int | None:
        # Final only once all layers are built: each has to be able to return states.
        return None if self.checkpoint_alignment is None else compat.checkpoint_grid(self._vllm_config)

    def run(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        raw: Tensor,
        mixed: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        """Compute the prompts of a batch, whose rows follow those of ``num_decode_tokens`` decoded tokens.

        ``raw`` and ``mixed`` are the convolution's input and output, ``[num_tokens, conv_dim]``; ``b`` and ``a`` are
        ``[num_tokens, num_v_heads]`` and ``out`` is ``[num_tokens, num_v_heads, head_v_dim]``.
        """
        d, cache = metadata.num_decode_tokens, layer.kv_cache[1]
        mixed, b, a, rows = mixed[d:], b[d:], a[d:], out[d:]
        starts, is_old = metadata.prefill_query_start_loc, metadata.prefill_has_initial_state
        if self._flashinfer is not None:
            slots = once(metadata, "prefill_slots", lambda: metadata.prefill_state_indices.contiguous())
            # No slot but those of new sequences and the null slot, which nothing reads; a mask would wait for the GPU.
            new = once(metadata, "new_slots", lambda: torch.where(is_old, NULL_BLOCK_ID, slots).long())
            cache.index_fill_(0, new, 0)
            checkpoints = self._checkpoints(layer, metadata)
            self._in_place(layer, mixed, b, a, rows, slots, once(metadata, "starts", starts.long), **checkpoints)
            if checkpoints:
                self._export(layer, metadata, raw, checkpoints["state_checkpoints"])
            return
        slots = metadata.prefill_state_indices
        state = cache[slots]
        state[~is_old] = 0
        indices, offsets = metadata.chunk_indices, metadata.chunk_offsets
        if self.backend == "triton" and self._built_for == "flashinfer":  # vLLM's metadata lacks them
            indices = once(metadata, "chunks", lambda: prepare_chunk_indices(starts, FLA_CHUNK_SIZE))
        core, state = self._gathered(layer, mixed, b, a, state, starts, indices, offsets)
        rows.copy_(core)
        cache[slots] = state.to(cache.dtype)

    def _prepare(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, *, exp: bool) -> tuple[Tensor, ...]:
        """Return normalized q and k, v, the log of the decay (its exponential if ``exp``) and beta."""
        return fused_post_conv_prep(
            conv_output=mixed,
            a=a,
            b=b,
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            num_k_heads=layer.dims.num_k_heads,
            head_k_dim=layer.head_k_dim,
            head_v_dim=layer.head_v_dim,
            apply_l2norm=True,
            output_g_exp=exp,
        )

    def _in_place(
        self,
        layer: DeltaNetLayer,
        mixed: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
        slots: Tensor,
        starts: Tensor,
        cache: Tensor | None = None,
        **more: Any,
    ) -> None:
        """Call FlashInfer's kernel on the cache's ``slots``; the results go to ``out`` and into the cache."""
        cache = layer.kv_cache[1] if cache is None else cache
        q, k, v, decay, beta = self._prepare(layer, mixed, b, a, exp=True)
        assert self._flashinfer is not None
        self._flashinfer(
            q,
            k,
            v,
            g=decay,
            beta=beta,
            initial_state=cache,
            output_state=cache,
            output_final_state=True,
            state_indices=slots,
            cu_seqlens=starts,
            output=out,
            **more,
        )

    def _gathered(
        self,
        layer: DeltaNetLayer,
        mixed: Tensor,
        b: Tensor,
        a: Tensor,
        state: Tensor,
        starts: Tensor,
        chunk_indices: Tensor | None,
        chunk_offsets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the results and the final states, from initial ``state`` ``[num_seqs, num_v_heads, V, K]``."""
        if self.backend == "torch":
            q, k, v = ops.split_heads(mixed, layer.dims)
            g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
            out, final_state = ops.chunk_gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=state.mT.float(), cu_seqlens=starts
            )
            return out, final_state.mT
        q, k, v, g, beta = (x.unsqueeze(0) for x in self._prepare(layer, mixed, b, a, exp=False))
        out, final_state = self._chunk(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=starts,
            chunk_indices=chunk_indices,
            chunk_offsets=chunk_offsets,
            use_qk_l2norm_in_kernel=False,
        )
        return out.squeeze(0), final_state

    def _checkpoints(self, layer: DeltaNetLayer, metadata: GDNAttentionMetadata) -> dict[str, Any]:
        """Return FlashInfer's arguments for the states that this batch has to keep of the middle of its prompts."""
        plan = getattr(metadata, "flashinfer_checkpoint_plan", None)
        if plan is None:
            return {}
        return {
            "state_checkpoints": self._buffer(layer)[: plan.num_checkpoints],
            "checkpoint_cu_starts": plan.cu_starts,
            "checkpoint_every_n_tokens": plan.every_n_tokens,
        }

    def _buffer(self, layer: DeltaNetLayer) -> Tensor:
        """Return vLLM's shared workspace, with room for the states of the largest batch."""
        assert self.checkpoint_grid is not None
        num_states = cdiv(self._vllm_config.scheduler_config.max_num_batched_tokens, self.checkpoint_grid)
        shape = (num_states, *layer.get_state_shape()[1])
        (buffer,) = current_workspace_manager().get_simultaneous((shape, torch.float32))
        return buffer

    def _export(self, layer: DeltaNetLayer, metadata: GDNAttentionMetadata, raw: Tensor, states: Tensor) -> None:
        """Copy the states and the convolution's last inputs at each checkpoint to their slots in the cache."""
        MambaPrefillCheckpointExporter(layer.conv_kernel_size - 1).export(
            metadata.checkpoint,
            raw_qkv=raw,
            conv_state=conv_view(layer.kv_cache[0]),
            recurrent_checkpoint=states,
            recurrent_state=layer.kv_cache[1],
            cu_seqlens=metadata.non_spec_query_start_loc,
            recurrent_rows=metadata.flashinfer_checkpoint_plan.rows,
        )

    def warm_up(self, layer: DeltaNetLayer, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor) -> None:
        """Compile and tune each kernel that a batch may need. The tensors are those of ``n`` tokens of such a batch."""
        n, device = len(qkv), qkv.device
        shape, state_dtype = layer.get_state_shape()[1], layer.get_state_dtype()[1]
        starts = torch.tensor([0, n], device=device)
        mixed = torch.randn(n, qkv.shape[1], dtype=qkv.dtype, device=device)
        state = torch.zeros(1, *shape, dtype=state_dtype, device=device)
        if self._flashinfer is None:
            indices = offsets = None
            if self.backend == "cutedsl":
                from vllm.model_executor.layers.mamba.ops.gdn_chunk_cutedsl import prepare_metadata_cutedsl

                indices, offsets = prepare_metadata_cutedsl(starts.int(), n)
            elif self.backend == "fla":
                indices = prepare_chunk_indices(starts.int(), FLA_CHUNK_SIZE)
            self._gathered(layer, mixed, b, a, state, starts.int(), indices, offsets)
            return
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        checkpoints: list[dict[str, Any]] = [{}]
        if self.checkpoint_grid is not None:
            checkpoints.append(
                {
                    "state_checkpoints": self._buffer(layer)[:1],  # the profile run is the last that may enlarge it
                    "checkpoint_cu_starts": torch.tensor([0, 1], device=device),
                    "checkpoint_every_n_tokens": n,
                }
            )
        # FlashInfer has a kernel for few sequences and one for many, each with checkpoints and without.
        for use_cp, more in itertools.product(("auto", False), checkpoints):
            self._in_place(layer, mixed, b, a, out, starts[:1].int(), starts, cache=state, use_cp=use_cp, **more)
