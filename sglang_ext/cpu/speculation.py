"""Speculative decoding on CPUs: torch functions for SGLang's Triton and CUDA kernels that draft and verify trees.

A tree of D drafts per sequence starts with token 0, the last accepted one. Functions have the names and signatures of
those that they replace (``compat.REPLACEMENTS``), and write to the same arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_ext.cpu import trees
from sglang_ext.cpu.trees import tree_parents

USE_FULL_MASK = False
"""NGRAM's setting: its mask tells which drafts see each other, and not which tokens of the sequence they see."""


def _ragged(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of every element from ``start[i]`` to ``end[i]`` [N], row after row."""
    lengths = (end - start).long()
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    return rows, torch.arange(len(rows)) + (start - lengths.cumsum(0) + lengths)[rows]


def assign_extend_cache_locs(
    *, req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor, **_: Any
) -> Tensor:
    """Return the cache slots of positions ``start_offset`` to ``end_offset`` of each request, as int64."""
    rows, columns = _ragged(start_offset, end_offset)
    return req_to_token[req_pool_indices[rows], columns].long()


def assign_draft_cache_locs_contiguous_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Write the slots that follow each sequence to ``out_cache_loc`` [N * topk * num_cols]."""
    assert positions is None and mrope is None, "asked for on CUDA only"
    columns = seq_lens[:, None] + torch.arange(topk * num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices[:, None], columns].flatten())


def assign_req_to_token_pool_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    rows, columns = _ragged(start_offset, end_offset)
    req_to_token[req_pool_indices[rows], columns] = out_cache_loc.to(req_to_token.dtype)


def fill_bonus_tokens_func(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int, batch_size: int
) -> None:
    """Write the last of each sequence's ``accept_lens`` [N] tokens to ``bonus_tokens``."""
    last = (accept_lens - 1).long()[:, None]
    bonus_tokens.copy_(accept_tokens.view(batch_size, accept_stride).gather(1, last)[:, 0])


def fill_front_out_cache_loc_func(num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor) -> None:
    """Pack the first ``num_front`` [N] of each sequence's slots in ``out_cache_loc`` [N * D]."""
    rows, columns = _ragged(torch.zeros_like(num_front), num_front)
    front_out_cache_loc[: len(rows)] = out_cache_loc.view(len(num_front), -1)[rows, columns]


def fill_accept_out_cache_loc_func(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int
) -> None:
    """Pack the slots of the accepted drafts."""
    accepted = accept_index[accept_index >= 0]
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def gather_spec_extras(indices: Tensor, *buffers: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return rows ``indices`` [N] of what the last step left for the next one, with overlapped scheduling."""
    return tuple(None if buffer is None else buffer[indices] for buffer in buffers)


def build_tree_kernel_efficient_func(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Write links, positions and ``tree_mask`` [N, D, D] (which token sees which) of trees of chosen candidates.

    ``top_scores_index`` [N, D - 1] holds their places among all candidates, ``topk`` for each place in ``parent_list``.
    """
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    assert tree_mask_mode == TreeMaskMode.QLEN_ONLY, "what CpuAttentionBackend.verify_mask asks for"
    num_sequences, depth = len(seq_lens), num_verify_tokens
    place = top_scores_index // topk
    parents = torch.zeros_like(place)
    if parent_list.shape[1]:
        same = top_scores_index[:, None] == parent_list.gather(1, place)[:, :, None]
        parents = torch.where(place == 0, 0, 1 + same.int().argmax(2))

    sequences = torch.arange(num_sequences)
    visible = torch.eye(depth, dtype=torch.bool).repeat(num_sequences, 1, 1)
    for i in range(1, depth):
        visible[:, i] |= visible[sequences, parents[:, i - 1]]
    trees.link(parents, retrieve_next_token, retrieve_next_sibling)
    retrieve_index.copy_(torch.arange(num_sequences * depth).view_as(retrieve_index))
    positions.copy_((seq_lens[:, None] + visible.sum(2) - 1).flatten())
    tree_mask[: visible.numel()] = visible.flatten()


def verify_tree_greedy_func(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the drafts in ``candidates`` [N, D] that are the model's choice after their parents.

    ``target_predict`` [N, D] holds the model's choices.
    """
    sequences = torch.arange(len(candidates))
    parents = tree_parents(retrieve_next_token, retrieve_next_sibling)
    last = _walk(
        parents,
        lambda node: candidates == target_predict[sequences, node][:, None],
        predicts,
        accept_index,
        accept_token_num,
        candidates,
        retrieve_index,
    )
    predicts[retrieve_index[sequences, last]] = target_predict[sequences, last].to(predicts.dtype)
    return predicts, accept_index, accept_token_num


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Draw from ``target_probs`` [N, D, vocab], and accept a draft if it is the drawn token.

    ``uniform_samples`` [N, D] draws among a token's children. ``uniform_samples_for_final_sampling`` [N] draws the
    token after the last accepted one, from what the rejected children leave. Thresholds below 1 accept more, as in
    SGLang's kernel.
    """
    sequences = torch.arange(len(candidates))
    parents = tree_parents(retrive_next_token, retrive_next_sibling)
    target_probs = target_probs / target_probs.sum(-1, keepdim=True)

    def accepted(node: Tensor) -> Tensor:
        probs = target_probs[sequences, node].gather(1, candidates) * _children(parents, node)
        coins = uniform_samples[sequences, node][:, None]
        return (probs > 0) & ((coins < probs.cumsum(1) / threshold_acc) | (probs >= threshold_single))

    last = _walk(parents, accepted, predicts, accept_index, accept_token_num, candidates, retrive_index)
    probs = target_probs[sequences, last].double()
    rows, children = _children(parents, last).nonzero(as_tuple=True)
    rest = probs.clone()
    rest[rows, candidates[rows, children]] = 0
    probs = torch.where(rest.sum(1, keepdim=True) > 0, rest, probs)  # if nothing is left, rounding caused it
    cumulative = probs.cumsum(1)
    drawn = (cumulative <= uniform_samples_for_final_sampling[:, None] * cumulative[:, -1:]).sum(1)
    predicts[retrive_index[sequences, last]] = drawn.to(predicts.dtype)


def _children(parents: Tensor, node: Tensor) -> Tensor:
    """Return which of D tokens are children of ``node`` [N], as a mask [N, D]."""
    children = parents == node[:, None]
    children[:, 0] = False
    return children


def _walk(
    parents: Tensor,
    accepted: Callable[[Tensor], Tensor],
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
) -> Tensor:
    """Go from the root down, each time to the first child that ``accepted(node)`` [N, D] allows, and record the path.

    Return each sequence's last accepted token [N].
    """
    node = torch.zeros(len(parents), dtype=torch.long)
    going = torch.ones_like(node, dtype=torch.bool)
    accept_index[:, 0] = retrieve_index[:, 0]
    accept_token_num.zero_()
    for step in range(1, accept_index.shape[1]):
        allowed = accepted(node) & _children(parents, node) & going[:, None]
        going = allowed.any(1)
        rows = going.nonzero()[:, 0]
        child = allowed[rows].int().argmax(1)
        predicts[retrieve_index[rows, node[rows]]] = candidates[rows, child].to(predicts.dtype)
        accept_index[rows, step] = retrieve_index[rows, child].to(accept_index.dtype)
        accept_token_num[rows] += 1
        node[rows] = child
    return node


def top_k_renorm_prob(probs: Tensor, top_k: Tensor) -> Tensor:
    """Return ``probs`` [B, vocab] with zeros below the ``top_k`` [B] largest.

    The result need not sum to 1: top-p, which comes next, is a share of the whole distribution when SGLang samples
    without speculation. ``tree_speculative_sampling_target_only`` normalizes.
    """
    k = min(int(top_k.max()), probs.shape[1])
    largest, tokens = probs.topk(k, dim=1)
    return torch.zeros_like(probs).scatter(1, tokens, largest * (torch.arange(k) < top_k[:, None]))


def top_p_renorm_prob(probs: Tensor, top_p: Tensor) -> Tensor:
    """Return ``probs`` [B, vocab] with zeros after the smallest set that holds ``top_p`` [B]; not normalized either."""
    k = int((probs > 0).sum(1).max())
    largest, tokens = probs.topk(k, dim=1)
    kept = largest.cumsum(1) - largest <= top_p[:, None]
    return torch.zeros_like(probs).scatter(1, tokens, largest * kept)
