"""Expert ids of one rank."""

import torch


def local_experts(
    expert_map: torch.Tensor | None, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_weights`` and ``topk_ids`` by this rank's numbers of the experts, with zero for another rank's."""
    if expert_map is None:
        return topk_weights, topk_ids
    local = expert_map[topk_ids.long()].to(topk_ids.dtype)
    return torch.where(local < 0, 0, topk_weights), local.clamp_min(0)
