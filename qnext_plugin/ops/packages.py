"""Operators for prompts that come in packages of their own, for GPUs: flash-linear-attention and causal-conv1d.

An engine's own option names them (``docs/gpu.md``); its own kernels serve otherwise. A package is imported when it is
asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Package:
    """Where an operator is, a parameter that older versions lack, and what to install."""

    module: str
    operator: str
    parameter: str
    install: str


PACKAGES = {
    "fla": Package(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "state_v_first", "flash-linear-attention>=0.6"
    ),
    "causal_conv1d": Package("causal_conv1d", "causal_conv1d_fn", "seq_idx", "causal-conv1d>=1.4"),
}
CHOICES = (*PACKAGES, ",".join(PACKAGES))
"""What the engine's option may be, beside the engine's own names."""


def asked(option: str | None) -> tuple[str, ...]:
    """Return the packages that an option's value names; none where it is an engine's own."""
    return tuple(option.split(",")) if option in CHOICES else ()


@cache
def load(name: str) -> Callable[..., Any]:
    """Return the operator of a package; raise ``ValueError`` if it is not installed or too old."""
    package = PACKAGES[name]
    try:
        operator: Callable[..., Any] = getattr(import_module(package.module), package.operator)
    except (ImportError, AttributeError) as e:
        raise ValueError(
            f"the kernel for prompts is '{name}', and it cannot be imported ({e}); pip install '{package.install}', or "
            "leave the choice to the engine"
        ) from e
    if package.parameter not in signature(operator).parameters:
        raise ValueError(
            f"the kernel for prompts is '{name}', and the installed version does not take {package.parameter}; pip "
            f"install '{package.install}', or leave the choice to the engine"
        )
    return operator


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    chunk_indices: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Apply the delta rule to N packed sequences by flash-linear-attention's kernels.

    ``q``, ``k`` [1, T, Hk, K], ``v`` [1, T, Hv, V], ``g`` (log decay), ``beta`` [1, T, Hv], ``initial_state``
    [N, Hv, V, K] as both engines keep it, ``cu_seqlens`` [N + 1]. ``chunk_indices`` [chunks, 2] are the sequence and
    number of each chunk of 64 tokens; without them the host waits for the GPU. Returns ``out`` [1, T, Hv, V] and
    ``final_state`` [N, Hv, V, K] in float32.
    """
    out, final_state = load("fla")(
        q,
        k,
        v,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=True,
        cu_seqlens=cu_seqlens.long(),
        chunk_indices=chunk_indices,
    )
    return out, final_state


def causal_conv1d(x: Tensor, weight: Tensor, *, conv_state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve N packed sequences with SiLU by causal-conv1d, as ``ops.causal_conv1d`` does; nothing waits for the GPU.

    ``x`` [T, C], ``weight`` [C, W], ``conv_state`` [N, C, W - 1], ``cu_seqlens`` [N + 1]. Returns ``out`` [T, C] and
    ``new_state`` [N, C, W - 1]. The kernel takes packed sequences or states, not both, so each sequence is given its
    state's inputs as further tokens.
    """
    history, starts = conv_state.shape[2], cu_seqlens.long()
    num_seqs, num_tokens = len(starts) - 1, len(x)
    tokens = torch.arange(num_tokens + num_seqs * history, device=x.device)
    seqs = torch.arange(num_seqs, device=x.device)
    columns = torch.arange(history, device=x.device)
    rows = tokens[:num_tokens]
    rows = rows + history * torch.searchsorted(starts[1:], rows, right=True).add_(1)
    begins = (starts[:-1] + history * seqs)[:, None] + columns
    ends = (starts[1:] + history * seqs)[:, None] + columns
    stream = x.new_empty(len(tokens), x.shape[1])
    stream[rows] = x
    stream[begins] = conv_state.mT.to(x.dtype)
    owner = torch.searchsorted(starts[1:] + history * (seqs + 1), tokens, right=True).int()
    out = load("causal_conv1d")(stream.T[None], weight, None, seq_idx=owner[None], activation="silu")
    return out[0].T[rows], stream[ends].mT


def causal_conv1d_in_slots(
    x: Tensor, weight: Tensor, cache: Tensor, slots: Tensor, is_old: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Convolve as ``causal_conv1d``, with the states in ``cache`` [slots, C, >= W - 1], whose first columns are read.

    ``slots`` [N] are the sequences' and ``is_old`` [N] tells whether one holds a state already. Writes the new states
    to the cache and returns ``out`` [T, C].
    """
    slots, states = slots.long(), cache[..., : weight.shape[1] - 1]
    old = states[slots].masked_fill(~is_old[:, None, None], 0)
    out, new = causal_conv1d(x, weight, conv_state=old, cu_seqlens=cu_seqlens)
    states[slots] = new.to(cache.dtype)
    return out
