"""The formulas of Qwen3-Next for one sequence at a time, token by token, in the dtype of the inputs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def zero_centered_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``(1 + weight) * x / rms(x)`` over the last dimension."""
    return (1 + weight) * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``weight * x / rms(x) * silu(gate)`` over the last dimension."""
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * silu(gate)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + eps)


def gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return log decay ``g`` and write strength ``beta``, both [T, Hv] as ``a`` and ``b``."""
    softplus = torch.logaddexp(a + dt_bias, torch.zeros_like(a))
    return -torch.exp(A_log) * softplus, torch.sigmoid(b)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the recurrence of arXiv 2412.06464, eq. 10, with the kernels' L2 norms and scale.

    ``q``, ``k`` [T, Hk, K], ``v`` [T, Hv, V], ``g``, ``beta`` [T, Hv], ``state`` [Hv, K, V]. Returns ``out``
    [T, Hv, V] and the states after every token, [T, Hv, K, V].
    """
    heads_per_group = v.shape[1] // q.shape[1]
    q = l2norm(q).repeat_interleave(heads_per_group, dim=1) / math.sqrt(q.shape[-1])
    k = l2norm(k).repeat_interleave(heads_per_group, dim=1)
    out, states = torch.empty_like(v), state.new_empty(v.shape[0], *state.shape)
    for t in range(v.shape[0]):
        state = torch.exp(g[t])[:, None, None] * state
        remembered = torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - remembered))
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
        states[t] = state
    return out, states


def causal_conv1d(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a depthwise causal convolution, then SiLU.

    ``x`` [T, C], ``weight`` [C, W]. ``state`` [C, W - 1] holds the inputs before ``x``, oldest first. Returns ``out``
    [T, C] and the state after ``x``.
    """
    width = weight.shape[1]
    inputs = torch.cat([state, x.mT], dim=1)
    out = [silu((inputs[:, t : t + width] * weight).sum(1)) for t in range(x.shape[0])]
    return torch.stack(out), inputs[:, x.shape[0] :]


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Return weights and ids [T, top_k] of the likeliest experts by a softmax over all ``router_logits`` [T, E]."""
    probabilities = torch.exp(router_logits - torch.logsumexp(router_logits, dim=-1, keepdim=True))
    ids = torch.argsort(probabilities, dim=-1, descending=True)[:, :top_k]
    weights = torch.gather(probabilities, 1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def rope_frequencies(rope: Mapping[str, Any], rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the radians per position [rotary_dim / 2] and the factor on cos and sin.

    YaRN (arXiv 2309.00071, as ``transformers`` computes it) blends each frequency with itself divided by ``factor``.
    With partial rotary embedding, all its dimensions count within the rotated part, not within the head.
    """
    theta = float(rope["rope_theta"])
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
    if rope["rope_type"] == "default":
        return frequencies, 1.0

    factor = float(rope["factor"])
    original_length = rope["original_max_position_embeddings"]

    def dimension_turning(rotations: float) -> float:
        return rotary_dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(rope.get("beta_fast") or 32)
    high = dimension_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(rotary_dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return frequencies, float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return frequencies, magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return frequencies, magnitude(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of every head of ``x`` [T, H, D].

    Dimension ``i`` is paired with ``i + R / 2`` (NeoX style). ``cos`` and ``sin`` are [T, R / 2].
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention [T, H, D] of ``q`` [T, H, D] to ``k``, ``v`` [T, Hkv, D].

    Query head ``j`` reads KV head ``j // (H // Hkv)``.
    """
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads_per_group, dim=1), v.repeat_interleave(heads_per_group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def swiglu(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    return F.linear(silu(F.linear(x, gate_proj)) * F.linear(x, up_proj), down_proj)
