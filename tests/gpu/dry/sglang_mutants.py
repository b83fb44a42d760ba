"""Defects in our DeltaNet layer and its operators, each of which a dry run has to find."""

from collections.abc import Callable
from typing import Any

import torch


def _before_forward(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    from sglang_ext.gated_delta_net import GatedDeltaNet

    forward = GatedDeltaNet.forward

    def changed(self: Any, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        return forward(self, change(self, hidden_states), forward_batch)

    GatedDeltaNet.forward = changed


def waits_for_the_gpu() -> None:
    _before_forward(lambda layer, x: x * float(x.sum()))


def tensor_on_the_cpu() -> None:
    _before_forward(lambda layer, x: x + torch.arange(x.shape[-1], device="cpu"))


def one_copy_more() -> None:
    _before_forward(lambda layer, x: x.clone())


def another_type() -> None:
    _before_forward(lambda layer, x: x.double())


def wrong_stride() -> None:
    """Hand over gates whose rows are not contiguous."""
    from sglang_ext import gated_delta_net

    both = gated_delta_net.both

    def strided(*args: Any) -> Any:
        qkvz, (ba, bias) = both(*args)
        return qkvz, (ba.t().contiguous().t(), bias)

    gated_delta_net.both = strided


def shape_off_by_one() -> None:
    from tests.gpu.dry.sglang_ops import FAKES

    attention = FAKES["sgl_kernel::fwd"]

    def longer(*args: Any) -> Any:
        out, *rest = attention(*args)
        return out.new_empty(out.shape[0] + 1, *out.shape[1:]), *rest

    FAKES["sgl_kernel::fwd"] = longer
