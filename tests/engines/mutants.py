"""One-line breakages of a served model, each of which a named scenario must notice.

They are applied inside a live engine, so that all of them cost one start. A breakage that no scenario notices means
that the scenario's bound proves nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch


@dataclass(frozen=True)
class Mutant:
    """``applied(model)`` is a context manager inside which the served model is broken."""

    applied: Callable[[Any], AbstractContextManager[Any]]
    scenario: str
    config: str = "prefix"


def _mixers(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "GatedDeltaNet"]


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


def value_heads_swapped(model: Any) -> AbstractContextManager[None]:
    """The last two value heads' rows of one ``in_proj_qkvz``, as a permutation that counts a group wrongly leaves."""
    mixer = _mixers(model)[0]
    size, end = mixer.dims.head_v_dim, mixer.dims.conv_dim
    return _columns_swapped(mixer.in_proj_qkvz, end - 2 * size, end - size, size)


def b_and_a_swapped(model: Any) -> AbstractContextManager[None]:
    """``in_proj_ba`` of one layer as ``[a | b]``."""
    mixer = _mixers(model)[-1]
    return _columns_swapped(mixer.in_proj_ba, 0, mixer.dims.num_v_heads, mixer.dims.num_v_heads)


def query_and_gate_swapped(model: Any) -> AbstractContextManager[None]:
    """The first attention head's query rows as its gate and the other way round."""
    attention = next(m for m in model.modules() if type(m).__name__ == "GatedAttention")
    return _columns_swapped(attention.qkv_proj, 0, attention.head_dim, attention.head_dim)


def _ops(name: str, broken: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace ``qnext_plugin.ops.name`` by ``broken(original, *args, **kwargs)``."""
    from qnext_plugin import ops

    original = getattr(ops, name)
    return patch.object(ops, name, lambda *args, **kwargs: broken(original, *args, **kwargs))


def decay_sign(model: Any) -> AbstractContextManager[Any]:
    def broken(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        g, beta = original(*args, **kwargs)
        return -g, beta

    return _ops("gating", broken)


def _shifted_window(original: Callable[..., Any], *args: Any, conv_state: torch.Tensor, **kwargs: Any) -> Any:
    return original(*args, conv_state=conv_state.roll(1, dims=-1), **kwargs)


def conv_window_off_by_one_in_decode(model: Any) -> AbstractContextManager[Any]:
    return _ops("causal_conv1d_update", _shifted_window)


def conv_window_off_by_one_in_prefill(model: Any) -> AbstractContextManager[Any]:
    return _ops("causal_conv1d", _shifted_window)


COMMON = {
    "conv_window_off_by_one_in_decode": Mutant(conv_window_off_by_one_in_decode, "short"),
    "conv_window_off_by_one_in_prefill": Mutant(conv_window_off_by_one_in_prefill, "prefix_aba"),
    "value_heads_swapped": Mutant(value_heads_swapped, "short"),
    "b_and_a_swapped": Mutant(b_and_a_swapped, "short"),
    "query_and_gate_swapped": Mutant(query_and_gate_swapped, "short"),
    "decay_sign": Mutant(decay_sign, "short"),
}


def mutants(engine: str) -> dict[str, Mutant]:
    """Those that break our own layers, and those that break what the engine does with their states."""
    own: dict[str, Mutant] = import_module(f"tests.engines.{engine}_mutants").MUTANTS
    return COMMON | own
