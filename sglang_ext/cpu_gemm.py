"""Matrix products on CPU: bfloat16 weights packed once by oneDNN, as torch ships it, and experts one product each.

Left as they are, such weights are packed anew in every call, which for a few tokens costs as much as the product.
``cpu_products`` multiplies where it can read what oneDNN packs, oneDNN itself elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from sglang.srt.runtime_context import get_exec
from torch import Tensor, nn

from sglang_ext import cpu_products
from sglang_ext.compat import ON_CPU
from sglang_ext.kernels import KERNELS_RAN

PACKS: bool = ON_CPU and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether bfloat16 weights are packed in this process; a CPU without the instructions for it takes them as they are."""


class Packed:
    """Matrices of one size, in the place of ``weights`` [matrices, out, in]."""

    def __init__(self, weights: Tensor) -> None:
        self.matrices = [torch.ops.mkldnn._reorder_linear_weight(matrix) for matrix in weights]
        self.addresses, self.out_features = None, weights.shape[1]
        if cpu_products.readable(self.matrices[0], *weights.shape[1:]):
            self.addresses = np.array([torch.ops.mkldnn.data_ptr(matrix) for matrix in self.matrices])

    def products(self, x: Tensor, used: Sequence[int], counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
        """Of ``counts[i]`` rows of ``x`` after one another, by matrix ``used[i]``."""
        if self.addresses is not None and bias is None and x.dtype == torch.bfloat16:
            KERNELS_RAN.add("products")
            return cpu_products.products(x, self.addresses[used], counts, self.out_features)
        KERNELS_RAN.add("packed")
        product = torch.ops.mkldnn._linear_pointwise.default
        pairs = zip(x.split(counts), used, strict=True)
        parts = [product(part, self.matrices[i], bias, "none", [], "") for part, i in pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Inside, ``model``'s weights are as they were declared, so that some or all can be loaded; outside, packed."""
    for param in model.parameters():
        if packed := param.__dict__.pop("packed", None):
            param.data = torch.stack([matrix.to_dense() for matrix in packed.matrices]).view(param.plain_shape)
    try:
        yield
    finally:
        _pack_all(model)


def _pack_all(model: nn.Module) -> None:
    for module in model.modules() if PACKS else ():
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedFusedMoEMethod:
            pack(module.w13_weight)
            pack(module.w2_weight)
        elif method in (UnquantizedLinearMethod, PackedLinearMethod) or is_untied_head(module):
            pack(module.weight)
            module.quant_method = PackedLinearMethod()


def pack(param: nn.Parameter) -> None:
    """Keep a bfloat16 [out, in] or [experts, out, in] as ``param.packed``, and not as it is."""
    if param.dtype == torch.bfloat16:
        param.plain_shape = param.shape
        param.packed = Packed(param.data.view(-1, *param.shape[-2:]))
        param.data = param.data.new_empty(0)


def is_untied_head(module: nn.Module) -> bool:
    """And one that computes in the model's dtype. A tied head is an embedding, whose rows are looked up."""
    method = type(getattr(module, "quant_method", None))
    untied = type(module) is ParallelLMHead and method is UnquantizedEmbeddingMethod
    return untied and not get_exec().features.enable_fp32_lm_head


class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed: Packed | None = getattr(layer.weight, "packed", None)
        return packed.products(x, [0], [len(x)], bias) if packed else F.linear(x, layer.weight, bias)


def moe_forward(_: UnquantizedFusedMoEMethod, layer: nn.Module, dispatch_output: StandardDispatchOutput) -> Any:
    """What SGLang's ``moe_forward_native`` does of it for this model: SiLU, no biases."""
    topk_weights, topk_ids, _ = dispatch_output.topk_output
    w13, w2 = (getattr(weight, "packed", weight) for weight in (layer.w13_weight, layer.w2_weight))
    out = routed_experts(dispatch_output.hidden_states, w13, w2, topk_weights, topk_ids)
    return StandardCombineInput(hidden_states=out)


def routed_experts(
    x: Tensor, w13: Packed | Tensor, w2: Packed | Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """``sum_k topk_weights[:, k] w2[e] (silu(gate) up)`` where ``[gate | up] = w13[e] x`` and ``e = topk_ids[:, k]``.

    ``x`` [T, H]; ``w13`` [2 I, H] and ``w2`` [H, I] for each expert; ``topk_weights``, ``topk_ids`` [T, K], with -1 for
    another rank's experts. Returns [T, H].
    """
    flat_ids = topk_ids.flatten()
    order = flat_ids.argsort()[int((flat_ids < 0).sum()) :]
    if not len(order):
        return torch.zeros_like(x)
    used, counts = (found.tolist() for found in flat_ids[order].unique_consecutive(return_counts=True))

    def products(rows: Tensor, weights: Packed | Tensor) -> Tensor:
        if isinstance(weights, Packed):
            return weights.products(rows, used, counts)
        return torch.cat([F.linear(part, weights[i]) for part, i in zip(rows.split(counts), used, strict=True)])

    gate, up = products(x.index_select(0, order // topk_ids.shape[1]), w13).float().chunk(2, dim=-1)
    # The rest is linear, so the routing weights may come before it, to be rounded together with what they multiply.
    hidden = F.silu(gate).mul_(up).mul_(topk_weights.flatten()[order, None])
    out = products(hidden.to(x.dtype), w2)
    if len(order) == len(flat_ids):
        places = order.argsort()
    else:
        places = torch.full_like(flat_ids, len(order), dtype=order.dtype)
        places[order] = torch.arange(len(order))
        out = F.pad(out, (0, 0, 0, 1))
    return F.embedding_bag(places.view_as(topk_ids), out, mode="sum")
