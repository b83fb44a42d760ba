"""Softmax attention over SGLang's paged cache on CPUs, with torch's own kernel."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.eagle_utils import TreeMaskMode
from torch import Tensor

Group = tuple[slice | Tensor, Tensor, Tensor | None]
"""The queries of N sequences: their rows, locations of their keys [N, L], and which keys they see [N, 1, Q, L]."""


class CpuKVPool(MHATokenToKVPool):
    """A pool that moves keys and values of accepted drafts with torch; SGLang's pool starts a Triton kernel for it."""

    def __init__(self, *args: Any, enable_kv_cache_copy: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_native_move_kv_cache = True


class CpuAttentionBackend(AttentionBackend):
    """Attention of ``q`` [T, heads * head_dim] to ``k``, ``v`` [T, kv_heads, head_dim]; gives [T, heads * head_dim]."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.device = runner.device
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.groups: list[Group] = []
        self._verify_mask = None
        drafts = get_spec().speculative_num_draft_tokens
        if drafts and not runner.is_draft_worker:
            requests = len(self.req_to_token)
            seen = torch.zeros(requests * drafts * drafts, dtype=torch.bool)
            self._verify_mask = VerifyMask(seen, TreeMaskMode.QLEN_ONLY, requests)

    @property
    def verify_mask(self) -> VerifyMask | None:
        """Return the mask in which SGLang notes which of a sequence's D drafts see each other, [N, D, D]."""
        return self._verify_mask

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare what every layer of this step reads: where the keys are, and which of them each query may see."""
        requests, mode = forward_batch.req_pool_indices, forward_batch.forward_mode
        if mode.is_decode_or_idle():
            self.groups = self._uniform(requests, forward_batch.seq_lens - 1, torch.ones(len(requests), 1, 1).bool())
        elif mode.is_target_verify():
            drafts = forward_batch.spec_info
            size = drafts.draft_token_num
            seen = drafts.custom_mask[: len(requests) * size**2].view(-1, size, size)
            self.groups = self._uniform(requests, forward_batch.seq_lens, seen)
        elif mode.is_draft_extend_v2():
            size = len(forward_batch.input_ids) // len(requests)
            seen = torch.ones(size, size, dtype=torch.bool).tril_().expand(len(requests), -1, -1)
            self.groups = self._uniform(requests, forward_batch.extend_prefix_lens, seen)
        else:
            prefixes, lengths = forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist()
            self.groups = []
            start = 0
            for request, prefix, length in zip(requests.tolist(), prefixes, lengths, strict=True):
                mask = torch.ones(length, prefix + length, dtype=torch.bool).tril_(prefix) if prefix else None
                locations = self.req_to_token[request, None, : prefix + length]
                self.groups.append((slice(start, start + length), locations, mask))
                start += length

    def _uniform(self, requests: Tensor, prefixes: Tensor, seen: Tensor) -> list["Group"]:
        """Return the groups of sequences with Q tokens each.

        These tokens see all ``prefixes`` [N] tokens before them, and each other as ``seen`` [N, Q, Q] allows.
        """
        size = seen.shape[1]
        groups: list[Group] = []
        for some, columns in alike(prefixes + size, self.req_to_token.shape[1]):
            own = torch.arange(columns) - prefixes[some, None]
            among = seen[some].gather(2, own.clamp(0, size - 1)[:, None].expand(-1, size, -1))
            mask = (own < 0)[:, None] | (among & (own < size)[:, None])
            locations = self.req_to_token[requests[some], :columns]
            groups.append((tokens_of(some, size), locations, mask[:, None]))
        return groups

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
        for rows, locations, mask in self.groups:
            queries = q[rows].unflatten(0, (len(locations), -1)).transpose(1, 2)
            attended = attend(queries, keys[locations], values[locations], layer, mask)
            out[rows] = attended.transpose(1, 2).flatten(0, 1)
        return out.flatten(1)

    forward_decode = forward_extend

    def _cache(
        self, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch, save: bool
    ) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values, and return the layer's entire caches [tokens, kv_heads, head_dim]."""
        pool = self.token_to_kv_pool
        if save and k is not None:
            if pool.dtype == torch.float8_e4m3fn:
                k, v = (quantized(x, scale) for x, scale in zip((k, v), cache_scales(layer), strict=True))
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


class CpuDraftBackend:
    """The attention of the steps in which a draft continues by itself, with one backend for each step."""

    def __init__(self, runner: Any, topk: int, num_steps: int) -> None:
        self.topk, self.num_steps = topk, num_steps
        self.attn_backends = [CpuAttentionBackend(runner) for _ in range(num_steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare each step, in which each of ``topk`` branches sees the sequence and its own steps.

        The cache holds the steps after the sequence, branch after branch.
        """
        requests, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        branches = torch.arange(self.topk)[:, None]
        for backend in self.attn_backends:
            backend.groups = []
        req_to_token = self.attn_backends[0].req_to_token
        for some, columns in alike(lengths + self.topk * self.num_steps, req_to_token.shape[1]):
            own = (torch.arange(columns) - lengths[some, None])[:, None]
            locations = req_to_token[requests[some], :columns]
            for step, backend in enumerate(self.attn_backends):
                seen = (own < 0) | ((own // self.num_steps == branches) & (own % self.num_steps <= step))
                backend.groups.append((tokens_of(some, self.topk), locations, seen[:, None]))


def create_decode_backend(factory: Any) -> CpuDraftBackend | None:
    """Replace ``DraftBackendFactory.create_decode_backend``; return None for drafts of a single step."""
    steps = factory.speculative_num_steps
    return CpuDraftBackend(factory.draft_model_runner, factory.topk, steps) if steps > 1 else None


def create_draft_extend_backend(factory: Any) -> CpuAttentionBackend:
    """Replace ``DraftBackendFactory.create_draft_extend_backend``."""
    return CpuAttentionBackend(factory.draft_model_runner)


def alike(lengths: Tensor, most: int) -> Iterator[tuple[Tensor, int]]:
    """Split N sequences into groups; yield the indices of each group and how many keys it is computed with.

    Torch's kernel sums over keys in an order that depends on that number, so it follows from a sequence's own length
    alone, and a sequence gets the same bits in every batch. It is at most ``most``, and at most an eighth above the
    length if that is over 256.
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths.tolist()):
        step = 1 << max(5, (length - 1).bit_length() - 4)
        groups.setdefault(min(-(-length // step) * step, most), []).append(i)
    for columns, some in sorted(groups.items()):
        yield torch.tensor(some), columns


def tokens_of(sequences: Tensor, size: int) -> Tensor:
    """Return the rows of the tokens of some ``sequences``, each of which has ``size`` tokens."""
    return (sequences[:, None] * size + torch.arange(size)).flatten()


def cache_scales(layer: RadixAttention) -> tuple[float, float]:
    """Return what keys and values in an FP8 cache are multiplied with; 1 where the checkpoint has no scales."""
    return layer.k_scale_float or 1.0, layer.v_scale_float or 1.0


def quantized(x: Tensor, scale: float) -> Tensor:
    """Round keys or values to FP8; torch would make NaN of those beyond its range."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)


def attend(q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, mask: Tensor | None) -> Tensor:
    """Return the attention of ``q`` to ``k``, ``v`` [N, L, kv_heads, D]; ``q`` and result are [N, heads, Q, D].

    It is causal without a ``mask``.
    """
    if k.dtype == torch.float8_e4m3fn:
        k, v = (x.to(q.dtype) * scale for x, scale in zip((k, v), cache_scales(layer), strict=True))
    k, v = (x.transpose(1, 2).to(q.dtype) for x in (k, v))
    grouped = layer.tp_q_head_num != layer.tp_k_head_num
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=layer.scaling, enable_gqa=grouped
    )
