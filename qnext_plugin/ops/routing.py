"""Which experts a token goes to."""

import torch
from torch import Tensor


def route(router_logits: Tensor, *, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the ``top_k`` largest, made to sum to 1 if ``renormalize``.

    ``router_logits`` [..., E]. Returns ``weights`` [..., top_k], largest first, at least float32, and ``ids``
    [..., top_k], int64.
    """
    probabilities = router_logits.softmax(-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))
    weights, ids = probabilities.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
