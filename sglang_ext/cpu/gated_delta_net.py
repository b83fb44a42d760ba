"""Gated DeltaNet on CPUs: ``qnext_plugin.ops`` under the names and signatures of SGLang's kernels.

They take any dtype and size. A decode step on float32 states is compiled (``ops.cpu.delta_rule``).
"""

from typing import Any

import torch
from sglang.srt.layers.attention.linear.kernels.kernel_backend import LinearAttnKernelBase
from torch import Tensor

from qnext_plugin import ops
from qnext_plugin.kernel_log import record
from qnext_plugin.ops.cpu import delta_rule
from sglang_ext.cpu.trees import tree_parents

CHUNK = 64
"""The number of tokens between the states that SGLang keeps of a prefill for its prefix cache."""


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    *,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    **_: Any,
) -> Tensor:
    """Convolve N packed sequences ``x`` [C, T] and update ``conv_states`` [slots, C, W - 1]. Return [C, T]."""
    state = torch.where(has_initial_state[:, None, None], conv_states[cache_indices], 0)
    out, conv_states[cache_indices] = ops.causal_conv1d(x.mT, weight, conv_state=state, cu_seqlens=query_start_loc)
    return out.mT


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: Tensor,
    intermediate_conv_window: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    retrieve_next_token: Tensor | None = None,
    retrieve_next_sibling: Tensor | None = None,
    retrieve_parent_token: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Convolve ``x`` [N, C], one token per sequence, and update ``conv_state`` [slots, C, W - 1]. Return [N, C].

    Or verify drafts ``x`` [N, C, D], a chain or a tree: ``conv_state`` stays unchanged, ``intermediate_conv_window``
    [rows, D, C, W - 1] receives the state after each draft, and ``retrieve_parent_token`` [N, D] the tree's parents.
    """
    state = conv_state[conv_state_indices]
    if x.ndim == 2:
        out, conv_state[conv_state_indices] = ops.causal_conv1d_update(x, weight, conv_state=state)
        return out
    assert intermediate_conv_window is not None and intermediate_state_indices is not None
    if retrieve_next_token is None:
        first = torch.ones_like(conv_state_indices)
        out, stream = ops.causal_conv1d_verify(x.mT, weight, conv_state=state, num_accepted=first)
        windows = stream.unfold(2, weight.shape[1] - 1, 1).transpose(1, 2)
    else:
        assert retrieve_next_sibling is not None and retrieve_parent_token is not None
        retrieve_parent_token.copy_(tree_parents(retrieve_next_token, retrieve_next_sibling))
        out, windows = ops.causal_conv1d_tree(x.mT, weight, conv_state=state, parents=retrieve_parent_token)
    for i in range(x.shape[2]):  # one by one: in SGLang's buffer neighboring windows share memory
        intermediate_conv_window[intermediate_state_indices, i] = windows[:, i]
    return out.contiguous().mT


def fused_gdn_gating(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``g`` and ``beta`` [1, T, Hv] from ``a`` and ``b`` [T, Hv]."""
    g, beta = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
    return g.unsqueeze(0), beta.unsqueeze(0)


class TorchGDNKernel(LinearAttnKernelBase):
    """The delta rule over a cache ``ssm_states`` [slots, Hv, K, V]; tokens are along axis 1 of ``[1, T, ...]``."""

    supports_track_state_snapshot = True

    def __init__(self) -> None:
        delta_rule.available()  # compiles it now, not at the first request

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        **_: Any,
    ) -> Tensor:
        g, beta = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
        record("decode")
        if delta_rule.serves(ssm_states):
            record("compiled")
            out = delta_rule.decode(q[0], k[0], v[0], g=g, beta=beta, states=ssm_states, slots=cache_indices)
        else:
            state = ssm_states.index_select(0, cache_indices)
            out, state = ops.recurrent_gated_delta_rule(q[0], k[0], v[0], g=g, beta=beta, initial_state=state)
            ssm_states[cache_indices] = state
        return out.unsqueeze(0)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        track_state: Tensor | None = None,
        track_chunk_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        """Prefill; ``track_state`` [N, Hv, K, V] receives the state after ``track_chunk_idx`` [N] chunks if >= 0."""
        tokens = [x[0] for x in (q, k, v, g, beta)]
        state = ssm_states[cache_indices].float()
        begin, end = query_start_loc[:-1].long(), query_start_loc[1:].long()
        out = torch.empty_like(tokens[2])
        if track_state is not None:
            assert track_chunk_idx is not None
            split = torch.where(track_chunk_idx >= 0, begin + track_chunk_idx * CHUNK, begin)
            state = prefill(tokens, state, begin, split, out)
            track_state.copy_(state)
            begin = split
        ssm_states[cache_indices] = prefill(tokens, state, begin, end, out).to(ssm_states.dtype)
        record("extend")
        return out.unsqueeze(0), None, None

    def target_verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        intermediate_states_buffer: Tensor,
        intermediate_state_indices: Tensor,
        cache_steps: int,
        retrieve_parent_token: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Verify ``cache_steps`` drafts per sequence.

        ``ssm_states`` stays unchanged, and ``intermediate_states_buffer`` [rows, most steps, Hv, K, V] receives the
        state after each draft.
        """
        gates = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
        q, k, v, g, beta = (x.unflatten(0, (-1, cache_steps)) for x in (q[0], k[0], v[0], *gates))
        out, states = ops.verify_gated_delta_rule(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=ssm_states[cache_indices[: len(v)]],
            parents=retrieve_parent_token,
        )
        intermediate_states_buffer[intermediate_state_indices[: len(v)], :cache_steps] = states
        record("verify")
        return out.flatten(0, 1).unsqueeze(0)


def prefill(tokens: list[Tensor], state: Tensor, begin: Tensor, end: Tensor, out: Tensor) -> Tensor:
    """Compute tokens ``begin[i]`` to ``end[i]`` of each sequence from ``state`` [N, Hv, K, V]; return the state after.

    ``tokens`` are q, k, v, g and beta; the outputs are written to ``out`` [T, Hv, V] in place.
    """
    lengths = end - begin
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    num_tokens = int(cu_seqlens[-1])
    if num_tokens == 0:
        return state
    whole = num_tokens == out.shape[0]
    rows = slice(None) if whole else torch.arange(num_tokens) + (begin - cu_seqlens[:-1]).repeat_interleave(lengths)
    q, k, v, g, beta = (x[rows] for x in tokens)
    out[rows], state = ops.chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=cu_seqlens, chunk_size=32
    )
    return state


def track_states_all_layers(
    conv_states: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    mask: Tensor,
    track_indices: Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """Copy states from slots ``cache_indices`` [N] to ``track_indices`` [N] where ``mask`` [N] is set, in every layer.

    ``conv_states`` and ``ssm_states`` are [layers, slots, ...].
    """
    rows = mask.nonzero()[:, 0]
    source, target = cache_indices[rows], track_indices[rows]
    for states in (conv_states, ssm_states):
        states[:, target] = states[:, source]


def track_states(conv_states: Tensor, ssm_states: Tensor, *args: Any, **kwargs: Any) -> None:
    """Do what ``track_states_all_layers`` does in one layer, whose states are [slots, ...]."""
    track_states_all_layers(conv_states[None], ssm_states[None], *args, **kwargs)


def commit_states_after_verify(
    caches: Any,
    slots: Tensor,
    steps: Tensor,
    track_slots: Tensor | None,
    track_steps: Tensor | None,
    src_indices_raw: Tensor | None = None,
) -> None:
    """Copy the states after draft ``steps`` [N] to ``slots`` [N] in every layer, where neither is negative.

    ``track_steps`` and ``track_slots`` do this for the prefix cache. ``src_indices_raw`` [N] are the rows of the
    verified sequences if those are not the first rows.
    """
    for target, step in ((slots, steps), (track_slots, track_steps)):
        if target is None or step is None:
            continue
        rows = ((step >= 0) & (target >= 0)).nonzero()[:, 0]
        source = rows if src_indices_raw is None else src_indices_raw[rows]
        target, step = target[rows], step[rows]
        caches.temporal[:, target] = caches.intermediate_ssm[:, source, step]
        for states, windows in zip(caches.conv, caches.intermediate_conv_window, strict=True):
            states[:, target] = windows[:, source, step]
