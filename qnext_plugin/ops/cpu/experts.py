"""Routed experts around whatever multiplies by their weights."""

from collections.abc import Callable, Sequence

import numpy as np
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
    ids = topk_ids.flatten().numpy()  # on a few integers a quarter of what torch's operators take
    elsewhere, *by_expert = np.bincount(ids + 1, minlength=1).tolist()
    used = [expert for expert, count in enumerate(by_expert) if count]
    if not used:
        return torch.zeros_like(x)
    counts = [by_expert[expert] for expert in used]
    sorted_places = ids.argsort(kind="stable")[elsewhere:]
    places = np.full(topk_ids.shape, len(sorted_places))
    places.reshape(-1)[sorted_places] = np.arange(len(sorted_places))
    order = torch.from_numpy(sorted_places)
    gate, up = gate_up(x, order // topk_ids.shape[1], used, counts).float().chunk(2, dim=-1)
    # The rest is linear, so the routing weights may come before it, to be rounded together with what they multiply.
    hidden = F.silu(gate).mul_(up).mul_(topk_weights.flatten()[order, None])
    out = down(hidden, used, counts)
    if elsewhere:
        out = F.pad(out, (0, 0, 0, 1))
    return F.embedding_bag(torch.from_numpy(places), out, mode="sum").to(x.dtype)
