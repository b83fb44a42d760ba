"""The compiled products as operators of torch, which graphs that it compiles call as they are."""

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
"""``gemm_avx2.linear`` by a matrix whose outputs are a multiple of BLOCK."""

experts_operator = torch.ops.qnext.cpu_experts
"""``routed_experts`` of ``x``, with packed ``w13`` [experts, 2 I, H] and ``w2`` [experts, H, I]."""
