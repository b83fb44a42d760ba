"""The math of Qwen3-Next as functions of plain torch tensors, for every float dtype, device and head size."""

from qnext_plugin.ops.causal_conv1d import (
    accepted_window,
    causal_conv1d,
    causal_conv1d_tree,
    causal_conv1d_update,
    causal_conv1d_verify,
)
from qnext_plugin.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    gating,
    l2norm,
    recurrent_gated_delta_rule,
    split_heads,
    verify_gated_delta_rule,
)
from qnext_plugin.ops.norms import rms_norm_gated, zero_centered_rms_norm
from qnext_plugin.ops.routing import route

__all__ = [
    "accepted_window",
    "causal_conv1d",
    "causal_conv1d_tree",
    "causal_conv1d_update",
    "causal_conv1d_verify",
    "chunk_gated_delta_rule",
    "gating",
    "l2norm",
    "recurrent_gated_delta_rule",
    "rms_norm_gated",
    "route",
    "split_heads",
    "verify_gated_delta_rule",
    "zero_centered_rms_norm",
]
