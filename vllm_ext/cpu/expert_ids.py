"""Converts global expert ids to those of one rank."""

import torch


def local_experts(
    expert_map: torch.Tensor | None, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``topk_weights`` and ``topk_ids`` with this rank's expert ids; other ranks' experts get weight 0."""
    if expert_map is None:
        return topk_weights, topk_ids
    local = expert_map[topk_ids.long()].to(topk_ids.dtype)
    return torch.where(local < 0, 0, topk_weights), local.clamp_min(0)
