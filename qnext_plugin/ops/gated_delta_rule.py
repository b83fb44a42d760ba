"""The gated delta rule, for single-token decode, multi-token verification and chunked prefill.

Each value head has a state ``S`` [K, V], a log decay ``g`` and a write strength ``beta`` (Yang et al., "Gated Delta
Networks", arXiv 2412.06464, eq. 10)::

    S <- exp(g) S;   S <- S + k (beta (v - S^T k))^T;   out = S^T q

``q`` and ``k`` are L2-normalized here and ``q`` is scaled by ``K**-0.5``. Value head ``j`` reads key head
``j // (Hv // Hk)``. Sums are in float32 (float64 for float64 inputs), outputs in ``v``'s dtype, states in
``initial_state``'s. No argument is modified.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext_plugin.config import GatedDeltaNetDims

VECTORS = 32
"""Torch computes so many elements at once on CPUs, and what is left at the end of a tensor by another formula.

A row whose length is a multiple of it gets the same bits in every batch.
"""


def split_heads(mixed: Tensor, dims: GatedDeltaNetDims) -> tuple[Tensor, Tensor, Tensor]:
    """Split the convolution's output ``[num_tokens, conv_dim]`` into views of its heads.

    Returns ``q``, ``k`` [num_tokens, num_k_heads, head_k_dim] and ``v`` [num_tokens, num_v_heads, head_v_dim].
    """
    q, k, v = mixed.split([dims.key_dim, dims.key_dim, dims.value_dim], dim=-1)
    return (
        q.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        k.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        v.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)),
    )


def gating(a: Tensor, b: Tensor, *, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return log decay ``g = -exp(A_log) * softplus(a + dt_bias)`` (<= 0) and write strength ``beta = sigmoid(b)``.

    ``a`` and ``b`` [..., Hv] are logits; ``A_log`` and ``dt_bias`` are [Hv]. Both results are [..., Hv] in float32
    (float64 for float64 inputs).
    """
    compute = torch.promote_types(a.dtype, torch.float32)
    heads = a.shape[-1]
    a, b, A_log, dt_bias = (x.to(compute) for x in (a, b, A_log, dt_bias))
    if heads % VECTORS:
        a, b, A_log, dt_bias = (F.pad(x, (0, -heads % VECTORS)) for x in (a, b, A_log, dt_bias))
    g = -A_log.exp() * F.softplus(a + dt_bias)
    return g[..., :heads], b.sigmoid()[..., :heads]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``x * rsqrt(sum(x^2) + eps)`` over the last dimension, as in ``fla`` and ``transformers``.

    The result is in float32 (float64 for float64 inputs).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the rule to one token of each of N sequences.

    ``q``, ``k`` [N, Hk, K], ``v`` [N, Hv, V], ``g``, ``beta`` [N, Hv], ``initial_state`` [N, Hv, K, V].
    Returns ``out`` [N, Hv, V] and ``final_state`` [N, Hv, K, V].
    """
    out, states = verify_gated_delta_rule(
        q[:, None], k[:, None], v[:, None], g=g[:, None], beta=beta[:, None], initial_state=initial_state
    )
    return out[:, 0], states[:, 0]


def verify_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rule to D draft positions of each of N sequences, and keep the state after every position.

    ``q``, ``k`` [N, D, Hk, K], ``v`` [N, D, Hv, V], ``g``, ``beta`` [N, D, Hv], ``initial_state`` [N, Hv, K, V].
    Returns ``out`` [N, D, Hv, V] and ``states`` [N, D, Hv, K, V]. After ``n`` accepted positions, continue from
    ``states[:, n - 1]``. Shorter sequences can be padded at the end with any values: no position reads a later one.
    In a tree of drafts each position follows its entry of ``parents`` [N, D] instead of the position before it (as
    in ``causal_conv1d_tree``); continue from the state of the last accepted position.
    """
    heads_per_group = v.shape[2] // q.shape[2]
    compute = torch.promote_types(v.dtype, torch.float32)
    qk = torch.stack([l2norm(q).to(compute) * q.shape[-1] ** -0.5, l2norm(k).to(compute)], dim=3)
    qk = qk.repeat_interleave(heads_per_group, dim=2)
    q_dot_k = (qk[..., 0, :] * qk[..., 1, :]).sum(-1, keepdim=True)
    beta, decay = beta.to(compute)[..., None], g.to(compute).exp()[..., None, None]

    out = torch.empty_like(v)
    state = initial_state.to(compute)
    states = state.new_empty(v.shape[0], v.shape[1], *state.shape[1:])
    sequences = torch.arange(v.shape[0], device=v.device)
    for i in range(v.shape[1]):
        if i and parents is not None:
            state = states[sequences, parents[:, i]]
        # S^T q after the write is S^T q before it plus (q . k) times the written value, so one pass over S does both
        # reads.
        read_q, read_k = ((qk[:, i] @ state) * decay[:, i]).unbind(-2)
        delta = beta[:, i] * (v[:, i] - read_k)
        out[:, i] = read_q + q_dot_k[:, i] * delta
        state = torch.mul(state, decay[:, i], out=states[:, i])
        state.addcmul_(qk[:, i, :, 1, :, None], delta[..., None, :])
    return out, states.to(initial_state.dtype)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Apply the rule to N sequences, packed one after another, chunk by chunk.

    ``q``, ``k`` [T, Hk, K], ``v`` [T, Hv, V], ``g``, ``beta`` [T, Hv], ``initial_state`` [N, Hv, K, V],
    ``cu_seqlens`` [N + 1] (starts at 0, ends at T; empty sequences are allowed).
    Returns ``out`` [T, Hv, V] and ``final_state`` [N, Hv, K, V].

    Let ``c`` be the cumulative log decay within a chunk. The writes ``u`` (one row for each token) of the chunk solve
    one unit lower triangular system, the UT transform of arXiv 2412.06464, section 3.3::

        (I + strictly_lower(beta_i e^(c_i - c_j) k_i.k_j)) u = beta (v - e^c k S)
    """
    num_k_heads, head_k_dim = q.shape[1:]
    num_v_heads, head_v_dim = v.shape[1:]
    groups = (num_k_heads, num_v_heads // num_k_heads)
    dtype, compute = v.dtype, torch.promote_types(v.dtype, torch.float32)
    cu_seqlens = cu_seqlens.long()
    chunk_size = max(1, min(chunk_size, int(cu_seqlens.diff().max())))
    slots, order, active = _chunk_layout(cu_seqlens, q.shape[0], chunk_size)
    num_chunks = sum(active)

    def to_chunks(x: Tensor) -> Tensor:
        """Rearrange [T, heads, ...] to [chunks, heads, C, ...]."""
        chunks = x.new_zeros(num_chunks, x.shape[1], chunk_size, *x.shape[2:], dtype=compute)
        chunks.transpose(1, 2)[slots // chunk_size, slots % chunk_size] = x.to(compute)
        return chunks

    # Shapes: qk is [chunks, Hk, 1, C, 2, K]; v, beta and log_decay are [chunks, Hk, Hv // Hk, C, ...].
    qk = to_chunks(torch.stack([l2norm(q) * head_k_dim**-0.5, l2norm(k)], dim=2)).unsqueeze(2)
    q, k = qk.unbind(-2)
    v, beta, log_decay = (to_chunks(x).unflatten(1, groups) for x in (v, beta, g))
    log_decay = log_decay.cumsum(-1)

    # exp may overflow above the diagonal. tril_ drops those values; multiplying by a mask would make them NaN.
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).exp_().tril_()
    attention = q @ k.mT * decay
    system = decay.mul_(k @ k.mT).mul_(beta[..., None])
    solve = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)

    from_start = log_decay.exp()[..., None]
    to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]
    whole = log_decay[..., -1, None, None].exp()
    out = v.new_empty(num_chunks, chunk_size, num_v_heads, head_v_dim, dtype=dtype)
    states = initial_state[order].to(compute).unflatten(1, groups)
    start = 0
    for n in active:
        chunk, state = slice(start, start + n), states[:n]
        read_q, read_k = (qk[chunk].flatten(3, 4) @ state).unflatten(3, (chunk_size, 2)).unbind(-2)
        written = solve[chunk] @ torch.addcmul(v[chunk], from_start[chunk], read_k, value=-1)
        read = torch.addcmul(attention[chunk] @ written, from_start[chunk], read_q)
        out[chunk] = read.flatten(1, 2).transpose(1, 2)
        state.mul_(whole[chunk]).add_(k[chunk].mT @ written.mul_(to_end[chunk]))
        start += n

    final_state = torch.empty_like(initial_state)
    final_state[order] = states.flatten(1, 2).to(final_state.dtype)
    return out.flatten(0, 1).index_select(0, slots), final_state


def _chunk_layout(cu_seqlens: Tensor, num_tokens: int, chunk_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Lay chunks out by chunk index, then by sequence, longest first, and return where each token goes.

    Returns ``slots`` [T], the sequences' ``order`` [N], and for each i how many sequences have an i-th chunk. Those
    sequences are the first in ``order``, so each step of the scan over chunks works on a slice.
    """
    num_chunks = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
    order = num_chunks.argsort(descending=True, stable=True)
    index = torch.arange(int(num_chunks.max()), device=cu_seqlens.device)
    active = (num_chunks > index[:, None]).sum(1)
    first = active.cumsum(0) - active
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    position = tokens - cu_seqlens[sequence]
    slots = (first[position // chunk_size] + order.argsort()[sequence]) * chunk_size + position % chunk_size
    return slots, order, active.tolist()
