"""Routed experts, given functions that multiply by their weights."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GateUp = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]
"""A function of ``x``, ``rows`` [R], ``used`` and ``counts`` that returns [R, 2 I].

It multiplies the ``rows`` of ``x``, in order: the next ``counts[i]`` of them by the weight of expert ``used[i]``.
"""
Down = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""A function of float32 [R, I], ``used`` and ``counts``, as in ``GateUp``, that returns [R, H]."""


def routed_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: GateUp, down: Down) -> Tensor:
    """Return ``sum_k topk_weights[:, k] w2[e] (silu(gate) up)`` [T, H].

    Here ``[gate | up] = w13[e] x`` and ``e = topk_ids[:, k]``. ``x`` [T, H], ``topk_weights``, ``topk_ids`` [T, K];
    the id is -1 for another rank's expert. ``gate_up`` multiplies by ``w13``, ``down`` by ``w2``.
    """
    ids = topk_ids.numpy().ravel()  # for a few integers numpy takes a quarter of the time of torch's operators
    elsewhere, *by_expert = np.bincount(ids + 1, minlength=1).tolist()
    used = [expert for expert, count in enumerate(by_expert) if count]
    if not used:
        return torch.zeros_like(x)
    counts = [by_expert[expert] for expert in used]
    sorted_places = ids.argsort(kind="stable")[elsewhere:]
    places = np.full(topk_ids.shape, len(sorted_places))
    places.reshape(-1)[sorted_places] = np.arange(len(sorted_places))
    order = torch.from_numpy(sorted_places)
    rows = torch.from_numpy(sorted_places // topk_ids.shape[1])
    gate, up = gate_up(x, rows, used, counts).float().chunk(2, dim=-1)
    # The rest is linear, so the routing weights can be applied here already: the product is rounded only once.
    hidden = F.silu(gate).mul_(up).mul_(topk_weights.flatten()[order, None])
    out = down(hidden, used, counts)
    if elsewhere:
        out = F.pad(out, (0, 0, 0, 1))
    return F.embedding_bag(torch.from_numpy(places), out, mode="sum").to(x.dtype)
