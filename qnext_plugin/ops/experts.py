"""Routed experts around whatever multiplies by their weights."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GateUp = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]
"""Of ``x``, its ``rows`` [R], ``used`` and ``counts``: ``counts[i]`` of the rows by expert ``used[i]``; [R, 2 I]."""
Down = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""Of float32 [R, I], ``used`` and ``counts``: [R, H]."""


def routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: GateUp, down: Down) -> Tensor:
    """``sum_k topk_weights[:, k] w2[e] (silu(gate) up)`` where ``[gate | up] = w13[e] x`` and ``e = topk_ids[:, k]``.

    ``x`` [T, H]; ``gate_up`` multiplies by ``w13``, ``down`` by ``w2``; ``topk_weights``, ``topk_ids`` [T, K], with -1
    for another rank's experts. Returns [T, H].
    """
    flat_ids = topk_ids.flatten()
    order = flat_ids.argsort()[int((flat_ids < 0).sum()) :]
    if not len(order):
        return torch.zeros_like(x)
    used, counts = (found.tolist() for found in flat_ids[order].unique_consecutive(return_counts=True))
    gate, up = gate_up(x, order // topk_ids.shape[1], used, counts).float().chunk(2, dim=-1)
    # The rest is linear, so the routing weights may come before it, to be rounded together with what they multiply.
    hidden = F.silu(gate).mul_(up).mul_(topk_weights.flatten()[order, None])
    out = down(hidden, used, counts)
    if len(order) == len(flat_ids):
        places = order.argsort()
    else:
        places = torch.full_like(flat_ids, len(order), dtype=order.dtype)
        places[order] = torch.arange(len(order))
        out = F.pad(out, (0, 0, 0, 1))
    return F.embedding_bag(places.view_as(topk_ids), out, mode="sum").to(x.dtype)
