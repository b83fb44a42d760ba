"""The compiled products as torch operators; a graph that torch compiles calls them unchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qnext_plugin.ops.cpu import gemm_avx2, quantized
from qnext_plugin.ops.cpu.experts import routed_experts
from qnext_plugin.ops.cpu.gemm_avx2 import available, pack
from qnext_plugin.ops.cpu.packing import Form


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return gemm_avx2.linear(x, packed, bias, len(packed))


def _experts(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    def gate_up(x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return gemm_avx2.products(x, w13, used, counts, rows, torch.float32)

    def down(x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return gemm_avx2.products(x, w2, used, counts)

    return routed_experts(x, topk_weights, topk_ids, gate_up, down)


def _quantized_linear(x: Tensor, packed: Tensor, bias: Tensor | None, form: Sequence[int], n: int) -> Tensor:
    return quantized.linear(Form(*form), x, packed, bias, n)


def _quantized_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    form13: Sequence[int],
    form2: Sequence[int],
) -> Tensor:
    return quantized.experts((Form(*form13), Form(*form2)), x, w13, w2, topk_weights, topk_ids)


__all__ = [
    "available",
    "experts_operator",
    "linear_operator",
    "pack",
    "quantized_experts_operator",
    "quantized_linear_operator",
]

LIBRARY = torch.library.Library("qnext", "DEF")
LIBRARY.define("cpu_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
LIBRARY.define("cpu_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids) -> Tensor")
LIBRARY.define("cpu_quantized_linear(Tensor x, Tensor packed, Tensor? bias, int[] form, int n) -> Tensor")
LIBRARY.define(
    "cpu_quantized_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, int[] form13,"
    " int[] form2) -> Tensor"
)
LIBRARY.impl("cpu_linear", _linear, "CPU")
LIBRARY.impl("cpu_experts", _experts, "CPU")
LIBRARY.impl("cpu_quantized_linear", _quantized_linear, "CPU")
LIBRARY.impl("cpu_quantized_experts", _quantized_experts, "CPU")
torch.library.register_fake(
    "qnext::cpu_linear", lambda x, packed, bias: x.new_empty(x.shape[0], packed.shape[0]), lib=LIBRARY
)
torch.library.register_fake("qnext::cpu_experts", lambda x, *_: torch.empty_like(x), lib=LIBRARY)
torch.library.register_fake(
    "qnext::cpu_quantized_linear",
    lambda x, packed, bias, form, n: x.new_empty(x.shape[0], n, dtype=torch.bfloat16),
    lib=LIBRARY,
)
torch.library.register_fake("qnext::cpu_quantized_experts", lambda x, *_: torch.empty_like(x), lib=LIBRARY)

linear_operator = torch.ops.qnext.cpu_linear
"""This operator is ``gemm_avx2.linear`` for a matrix whose number of outputs is a multiple of BLOCK."""

experts_operator = torch.ops.qnext.cpu_experts
"""This operator is ``routed_experts`` for packed ``w13`` [experts, 2 I, H] and ``w2`` [experts, H, I]."""

quantized_linear_operator = torch.ops.qnext.cpu_quantized_linear
"""This operator is ``quantized.linear``: ``x`` [T, k], ``packed``, ``bias`` or None, the form and ``n``."""

quantized_experts_operator = torch.ops.qnext.cpu_quantized_experts
"""This operator is ``routed_experts`` for ``w13`` [experts, 2 I, H] and ``w2`` [experts, H, I], packed in two forms.

Both forms have their own ``k``: H and I.
"""
