"""Breakages of our own layers; see ``tests.mutants``."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.mutants import Mutant


def mixers(worker: Any) -> list[Any]:
    return [m for m in worker.model_runner.model.modules() if type(m).__name__ == "GatedDeltaNet"]


@contextmanager
def _columns_swapped(linear: Any, first: int, second: int, size: int) -> Iterator[None]:
    """Swap ``size`` output rows of a linear's weight, in what it returns: the weight itself may be packed."""

    def swap(module: Any, args: Any, output: Any) -> Any:
        wrong = output[0].clone()
        wrong[:, first : first + size] = output[0][:, second : second + size]
        wrong[:, second : second + size] = output[0][:, first : first + size]
        return wrong, *output[1:]

    handle = linear.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def value_heads_swapped(worker: Any) -> AbstractContextManager[None]:
    """The last two value heads' rows of one ``in_proj_qkvz``, as a permutation that counts a group wrongly leaves."""
    mixer = mixers(worker)[0]
    size, end = mixer.dims.head_v_dim, mixer.dims.conv_dim
    return _columns_swapped(mixer.in_proj_qkvz, end - 2 * size, end - size, size)


def b_and_a_swapped(worker: Any) -> AbstractContextManager[None]:
    """``in_proj_ba`` of one layer as ``[a | b]``."""
    mixer = mixers(worker)[-1]
    return _columns_swapped(mixer.in_proj_ba, 0, mixer.dims.num_v_heads, mixer.dims.num_v_heads)


def query_and_gate_swapped(worker: Any) -> AbstractContextManager[None]:
    """The first attention head's query rows as its gate and the other way round."""
    attention = next(m for m in worker.model_runner.model.modules() if type(m).__name__ == "GatedAttention")
    return _columns_swapped(attention.qkv_proj, 0, attention.head_dim, attention.head_dim)


def ops_replaced(name: str, broken: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace ``qnext_plugin.ops.name`` by ``broken(original, *args, **kwargs)``."""
    from qnext_plugin import ops

    original = getattr(ops, name)
    return patch.object(ops, name, lambda *args, **kwargs: broken(original, *args, **kwargs))


def decay_sign(worker: Any) -> AbstractContextManager[Any]:
    def broken(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        g, beta = original(*args, **kwargs)
        return -g, beta

    return ops_replaced("gating", broken)


def _shifted_window(original: Callable[..., Any], *args: Any, conv_state: torch.Tensor, **kwargs: Any) -> Any:
    return original(*args, conv_state=conv_state.roll(1, dims=-1), **kwargs)


def conv_window_off_by_one_in_decode(worker: Any) -> AbstractContextManager[Any]:
    return ops_replaced("causal_conv1d_update", _shifted_window)


def conv_window_off_by_one_in_prefill(worker: Any) -> AbstractContextManager[Any]:
    return ops_replaced("causal_conv1d", _shifted_window)


@contextmanager
def poisoned(states: list[torch.Tensor]) -> Iterator[None]:
    """NaN in every state slot while no request has one."""
    for state in states:
        state.fill_(math.nan)
    yield
    for state in states:
        state.zero_()


MUTANTS = [
    Mutant(conv_window_off_by_one_in_decode, "short"),
    Mutant(conv_window_off_by_one_in_prefill, "prefix_aba"),
    Mutant(conv_window_off_by_one_in_prefill, "prompt_logprobs", "chunked"),
    Mutant(value_heads_swapped, "short"),
    Mutant(b_and_a_swapped, "short"),
    Mutant(query_and_gate_swapped, "short"),
    Mutant(decay_sign, "short"),
]
