"""Softmax attention over SGLang's paged cache on CPU, with torch's own kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor


class CpuAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """``q`` [T, heads * head_dim], ``k``, ``v`` [T, kv_heads, head_dim] to [T, heads * head_dim]."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.device = runner.device
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """What every layer of this step reads: where the keys are, and which of them each query may see."""
        requests = forward_batch.req_pool_indices
        if forward_batch.forward_mode.is_decode_or_idle():
            lengths = forward_batch.seq_lens
            longest = int(lengths.max()) if len(lengths) else 0
            self.locations = self.req_to_token[requests, :longest]
            self.mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
            return
        self.sequences = []
        start = 0
        for request, prefix, length in zip(
            requests.tolist(),
            forward_batch.extend_prefix_lens.tolist(),
            forward_batch.extend_seq_lens.tolist(),
            strict=True,
        ):
            mask = torch.ones(length, prefix + length, dtype=torch.bool).tril_(prefix) if prefix else None
            locations = self.req_to_token[request, : prefix + length]
            self.sequences.append((slice(start, start + length), locations, mask))
            start += length

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        q = q.view(-1, layer.tp_q_head_num, 1, layer.qk_head_dim)
        out = attend(q, keys[self.locations], values[self.locations], layer, attn_mask=self.mask)
        return out.flatten(1)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_zeros(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        for rows, locations, mask in self.sequences:
            queries = q[rows].transpose(0, 1)[None]
            attended = attend(
                queries, keys[locations][None], values[locations][None], layer, attn_mask=mask, is_causal=mask is None
            )
            out[rows] = attended[0].transpose(0, 1)
        return out.flatten(1)

    def _cache(
        self, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch, save: bool
    ) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values, and return the layer's whole caches [tokens, kv_heads, head_dim]."""
        pool = self.token_to_kv_pool
        if save and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


def attend(q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, **mask: Any) -> Tensor:
    """``q`` [N, heads, Q, D], ``k``, ``v`` [N, L, kv_heads, D] to [N, heads, Q, D]."""
    k, v = (x.transpose(1, 2).to(q.dtype) for x in (k, v))
    grouped = layer.tp_q_head_num != layer.tp_k_head_num
    return F.scaled_dot_product_attention(q, k, v, scale=layer.scaling, enable_gqa=grouped, **mask)
