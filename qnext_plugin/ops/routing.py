"""Routing of tokens to experts."""

import torch
from torch import Tensor


def route(router_logits: Tensor, *, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` experts of each token by a softmax over all experts.

    ``router_logits`` [..., E]. Returns ``weights`` [..., top_k], largest first, and ``ids`` [..., top_k], int64. The
    weights are in float32 (float64 for float64 logits); if ``renormalize``, they sum to 1.
    """
    probabilities = router_logits.softmax(-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))
    weights, ids = probabilities.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
