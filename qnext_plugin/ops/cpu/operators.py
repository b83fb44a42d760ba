"""The compiled products as torch operators; a graph that torch compiles calls them unchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext_plugin.ops.cpu import gemm_avx2
from qnext_plugin.ops.cpu.experts import routed_experts
from qnext_plugin.ops.cpu.gemm_avx2 import available, pack


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return gemm_avx2.linear(x, packed, bias, len(packed))


def _experts(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    def gate_up(x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return gemm_avx2.products(x, w13, used, counts, rows, torch.float32)

    def down(x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return gemm_avx2.products(x, w2, used, counts)

    return routed_experts(x, topk_weights, topk_ids, gate_up, down)


__all__ = ["available", "experts_operator", "linear_operator", "pack"]

LIBRARY = torch.library.Library("qnext", "DEF")
LIBRARY.define("cpu_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
LIBRARY.define("cpu_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids) -> Tensor")
LIBRARY.impl("cpu_linear", _linear, "CPU")
LIBRARY.impl("cpu_experts", _experts, "CPU")
torch.library.register_fake(
    "qnext::cpu_linear", lambda x, packed, bias: x.new_empty(x.shape[0], packed.shape[0]), lib=LIBRARY
)
torch.library.register_fake("qnext::cpu_experts", lambda x, *_: torch.empty_like(x), lib=LIBRARY)

linear_operator = torch.ops.qnext.cpu_linear
"""This operator is ``gemm_avx2.linear`` for a matrix whose number of outputs is a multiple of BLOCK."""

experts_operator = torch.ops.qnext.cpu_experts
"""This operator is ``routed_experts`` for packed ``w13`` [experts, 2 I, H] and ``w2`` [experts, H, I]."""
