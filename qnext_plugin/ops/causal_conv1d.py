"""Depthwise causal convolution with SiLU over the ``[q | k | v]`` channels of Gated DeltaNet.

``out[t] = silu(sum_w weight[:, w] * x[t - W + 1 + w])``. Inputs before the first token of a call come from
``conv_state``: the sequence's last W - 1 inputs, oldest column first, zeros for a new sequence. Sums are in float32
(float64 for float64 inputs), outputs in ``x``'s dtype, states in ``conv_state``'s. No argument is modified.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1 << 18  # number of elements convolved at once; they fit in a CPU's cache


def causal_conv1d(x: Tensor, weight: Tensor, *, conv_state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve N sequences, packed one after another, of any lengths; they may be shorter than W - 1 or empty.

    ``x`` [T, C], ``weight`` [C, W], ``conv_state`` [N, C, W - 1], ``cu_seqlens`` [N + 1] (starts at 0, ends at T).
    Returns ``out`` [T, C] and ``new_state`` [N, C, W - 1].
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    out, new_state, weight = torch.empty_like(x), torch.empty_like(conv_state), weight.to(compute)
    rows = max(1, TILE // x.shape[1])
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        history = conv_state[i].mT.to(compute)
        for tokens, into in zip(x[begin:end].split(rows), out[begin:end].split(rows), strict=True):
            stream = torch.cat([history, tokens.to(compute)])
            into.copy_(_convolve(stream, weight))
            history = stream[len(tokens) :]
        new_state[i] = history.mT
    return out, new_state


def causal_conv1d_update(x: Tensor, weight: Tensor, *, conv_state: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve one token of each of N sequences.

    ``x`` [N, C], ``weight`` [C, W], ``conv_state`` [N, C, W - 1]. Returns ``out`` [N, C] and ``new_state``
    [N, C, W - 1].
    """
    stream = torch.cat([conv_state.permute(2, 0, 1), x[None].to(conv_state.dtype)])
    return _convolve(stream, weight)[0].to(x.dtype), stream[1:].permute(1, 2, 0)


def causal_conv1d_verify(
    x: Tensor, weight: Tensor, *, conv_state: Tensor, num_accepted: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve D tokens (one accepted, D - 1 drafts) of each of N sequences, and return a state that can roll back.

    ``x`` [N, D, C], ``weight`` [C, W]. ``conv_state`` [N, C, >= W - 1] is the state that the last call returned, and
    ``num_accepted`` [N] counts the tokens of that call that were accepted (>= 1; 1 after ``causal_conv1d`` or
    ``causal_conv1d_update``). Returns ``out`` [N, D, C] and ``new_state`` [N, C, W - 1 + D - 1]: W - 2 columns of
    history, then the D tokens. Shorter sequences can be padded at the end with any values: no token reads a later one.
    """
    window = accepted_window(conv_state, num_accepted, weight.shape[1])
    stream = torch.cat([window.permute(2, 0, 1), x.transpose(0, 1).to(window.dtype)])
    out = _convolve(stream, weight).transpose(0, 1)
    return out.to(x.dtype), stream[1:].permute(1, 2, 0)


def accepted_window(conv_state: Tensor, num_accepted: Tensor, width: int) -> Tensor:
    """Return the W - 1 columns before the next token, [N, C, W - 1].

    ``num_accepted`` [N] counts the accepted tokens of the last ``causal_conv1d_verify``, which returned
    ``conv_state``. The window starts at column ``num_accepted - 1``.
    """
    columns = (num_accepted - 1)[:, None] + torch.arange(width - 1, device=conv_state.device)
    return conv_state.gather(2, columns[:, None].expand(-1, conv_state.shape[1], -1))


def causal_conv1d_tree(x: Tensor, weight: Tensor, *, conv_state: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve the D tokens of a tree of drafts of each of N sequences; every token follows its parent.

    ``x`` [N, D, C], ``weight`` [C, W], ``conv_state`` [N, C, W - 1], ``parents`` [N, D]. The root is token 0 and its
    entry is not read; every other entry is smaller than the token's index. Returns ``out`` [N, D, C] and ``states``
    [N, D, C, W - 1], the state to continue from after each token.
    """
    num_sequences, num_tokens, _ = x.shape
    history = weight.shape[1] - 1
    stream = torch.cat([conv_state.mT, x.to(conv_state.dtype)], dim=1)
    before = torch.arange(-1, history + num_tokens - 1, device=x.device).repeat(num_sequences, 1)
    before[:, history + 1 :] = parents[:, 1:] + history
    path = [torch.arange(history, history + num_tokens, device=x.device).expand(num_sequences, -1)]
    for _ in range(history):
        path.insert(0, before.gather(1, path[0]))
    sequences = torch.arange(num_sequences, device=x.device)[:, None, None]
    windows = stream[sequences, torch.stack(path, dim=2)]
    compute = torch.promote_types(x.dtype, torch.float32)
    out = F.silu((windows.to(compute) * weight.to(compute).mT).sum(2))
    return out.to(x.dtype), windows[:, :, 1:].mT


def _convolve(stream: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``stream`` [L, ..., C] with ``weight`` [C, W] and apply SiLU; returns [L - W + 1, ..., C]."""
    compute = torch.promote_types(stream.dtype, torch.float32)
    stream, taps = stream.to(compute), weight.to(compute).mT.contiguous()
    length = stream.shape[0] - len(taps) + 1
    out = stream[:length] * taps[0]
    for w in range(1, len(taps)):
        out.addcmul_(stream[w : w + length], taps[w])
    return F.silu(out, inplace=True)
