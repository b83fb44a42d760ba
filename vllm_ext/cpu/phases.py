"""The convolution and the delta rule of a layer on CPU, by phase: vLLM's C++ kernels, and torch for all else."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as engine_ops
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from qnext_plugin import ops
from vllm_ext.state import DeltaNetLayer, conv_view


@dataclass(frozen=True)
class Prefills:
    """The packed prompt chunks of N sequences; ``slots`` and ``has_state`` are [N], ``cu_seqlens`` is [N + 1]."""

    slots: Tensor
    has_state: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Drafts:
    """The packed last tokens and drafts of N sequences, at most D tokens per sequence.

    ``slots`` [N, D] holds a slot for the state after each token; the first is also the convolution's. ``num_accepted``
    [N] is how many of the previous step's tokens were accepted: the state to continue from is in slot
    ``num_accepted - 1``. ``rows`` [N, D] pads the packed tokens to a rectangle, and ``real`` [N, D] marks those that
    are not padding. Usually all are real, and then ``full`` is true.
    """

    slots: Tensor
    num_accepted: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    real: Tensor
    full: bool

    def rectangle(self, packed: Tensor) -> Tensor:
        """Return packed rows as [N, D, ...]."""
        return packed.unflatten(0, self.rows.shape) if self.full else packed[self.rows]

    def packed(self, rectangle: Tensor) -> Tensor:
        return rectangle.flatten(0, 1) if self.full else rectangle[self.real]

    @classmethod
    def of(cls, metadata: GDNAttentionMetadata) -> "Drafts":
        n = metadata.num_spec_decodes
        slots, cu_seqlens = metadata.spec_state_indices_tensor[:n], metadata.spec_query_start_loc[: n + 1]
        start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
        rows = start + torch.arange(slots.shape[1], dtype=cu_seqlens.dtype)
        accepted = metadata.num_accepted_tokens[:n]
        real = rows < end
        return cls(slots, accepted, cu_seqlens, torch.minimum(rows, end - 1), real, full=bool(real.all()))


class TorchConv:
    name = "torch"

    def prepare_weights(self, layer: DeltaNetLayer) -> None:
        # In float32 with a contiguous row for each tap: otherwise the operators would convert it in every step.
        layer.packed_conv_weight = layer.conv1d.weight.squeeze(1).float().mT.contiguous().mT

    def decode(self, layer: DeltaNetLayer, x: Tensor, slots: Tensor) -> Tensor:
        cache = self._history(layer)
        out, cache[slots] = ops.causal_conv1d_update(x, layer.packed_conv_weight, conv_state=cache[slots])
        return out

    def prefill(self, layer: DeltaNetLayer, x: Tensor, batch: Prefills) -> Tensor:
        cache = self._history(layer)
        state = torch.where(batch.has_state[:, None, None], cache[batch.slots], 0)
        out, cache[batch.slots] = ops.causal_conv1d(
            x, layer.packed_conv_weight, conv_state=state, cu_seqlens=batch.cu_seqlens
        )
        return out

    def verify(self, layer: DeltaNetLayer, x: Tensor, drafts: Drafts) -> Tensor:
        cache, slots = conv_view(layer.kv_cache[0]), drafts.slots[:, 0]
        out, cache[slots] = ops.causal_conv1d_verify(
            drafts.rectangle(x),
            layer.packed_conv_weight,
            conv_state=cache[slots],
            num_accepted=drafts.num_accepted,
        )
        return drafts.packed(out)

    def _history(self, layer: DeltaNetLayer) -> Tensor:
        """Return the cache's columns of past tokens; with speculation, columns for drafts follow them."""
        return conv_view(layer.kv_cache[0])[..., : layer.conv_kernel_size - 1]


class CppConv:
    """The convolution by vLLM's C++ kernels, which take a cache with draft columns and use only the first columns."""

    name = "cpp"

    def prepare_weights(self, layer: DeltaNetLayer) -> None:
        weight = layer.conv1d.weight.squeeze(1).contiguous()
        layer.packed_conv_weight = engine_ops.causal_conv1d_weight_pack(weight)

    def decode(self, layer: DeltaNetLayer, x: Tensor, slots: Tensor) -> Tensor:
        return self._update(layer, x.contiguous(), slots)

    def verify(self, layer: DeltaNetLayer, x: Tensor, drafts: Drafts) -> Tensor:
        x = drafts.rectangle(x).contiguous()
        return drafts.packed(self._update(layer, x, drafts.slots[:, 0].contiguous(), drafts.num_accepted))

    def prefill(self, layer: DeltaNetLayer, x: Tensor, batch: Prefills) -> Tensor:
        return engine_ops.causal_conv1d_fwd_cpu(
            x=x.flatten().view(x.shape).transpose(0, 1),  # unlike `contiguous`, it also copies a single row with gaps
            weight=layer.packed_conv_weight,
            bias=None,
            conv_states=conv_view(layer.kv_cache[0]),
            query_start_loc=batch.cu_seqlens,
            cache_indices=batch.slots,
            has_initial_state=batch.has_state,
            silu_activation=True,
            is_weight_packed=True,
        ).transpose(0, 1)

    def _update(self, layer: DeltaNetLayer, x: Tensor, slots: Tensor, num_accepted: Tensor | None = None) -> Tensor:
        return engine_ops.causal_conv1d_update_cpu(
            x=x,
            conv_states=conv_view(layer.kv_cache[0]),
            weight=layer.packed_conv_weight,
            bias=None,
            silu_activation=True,
            conv_state_indices=slots,
            is_weight_packed=True,
            num_accepted_tokens=num_accepted,
        )


class TorchDelta:
    name = "torch"

    def decode(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, slots: Tensor) -> Tensor:
        cache = layer.kv_cache[1]
        q, k, v = ops.split_heads(mixed, layer.dims)
        g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
        out, state = ops.recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=cache[slots].float())
        cache[slots] = state.to(cache.dtype)
        return out

    def prefill(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, batch: Prefills) -> Tensor:
        cache = layer.kv_cache[1]
        q, k, v = ops.split_heads(mixed, layer.dims)
        g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
        state = torch.where(batch.has_state[:, None, None, None], cache[batch.slots], 0).float()
        out, state = ops.chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=batch.cu_seqlens, chunk_size=32
        )
        cache[batch.slots] = state.to(cache.dtype)
        return out

    def verify(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, drafts: Drafts) -> Tensor:
        cache = layer.kv_cache[1]
        q, k, v, a, b = (drafts.rectangle(x) for x in (*ops.split_heads(mixed, layer.dims), a, b))
        g, beta = ops.gating(a, b, A_log=layer.A_log, dt_bias=layer.dt_bias)
        accepted = drafts.slots.gather(1, drafts.num_accepted[:, None].long() - 1).squeeze(1)
        out, states = ops.verify_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=cache[accepted].float())
        cache[drafts.slots[drafts.real]] = states[drafts.real].to(cache.dtype)
        return drafts.packed(out)


class CppDelta:
    name = "cpp"

    def decode(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, slots: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(0) for x in ops.split_heads(mixed, layer.dims))
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

    def prefill(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, batch: Prefills) -> Tensor:
        q, k, v = (x.unsqueeze(0) for x in ops.split_heads(mixed, layer.dims))
        g, beta = engine_ops.fused_gdn_gating_cpu(
            A_log=layer.A_log, a=a.contiguous(), b=b.contiguous(), dt_bias=layer.dt_bias
        )
        cache = layer.kv_cache[1]
        cache[batch.slots[~batch.has_state]] = 0
        out, _ = engine_ops.chunk_gated_delta_rule_cpu(
            query=q,
            key=k,
            value=v,
            g=g,
            beta=beta,
            initial_state=cache,
            output_final_state=True,
            cu_seqlens=batch.cu_seqlens,
            head_first=False,
            use_qk_l2norm_in_kernel=True,
            initial_state_indices=batch.slots,
            eps=1e-6,
        )
        return out.squeeze(0)

    def verify(self, layer: DeltaNetLayer, mixed: Tensor, b: Tensor, a: Tensor, drafts: Drafts) -> Tensor:
        q, k, v = ops.split_heads(mixed, layer.dims)
        return engine_ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            q=q,
            k=k,
            v=v,
            a=a.contiguous(),
            b=b.contiguous(),
            initial_state_source=layer.kv_cache[1],
            spec_state_indices=drafts.slots.contiguous(),
            num_accepted_tokens=drafts.num_accepted,
            cu_seqlens=drafts.cu_seqlens,
            use_qk_l2norm_in_kernel=True,
        )
