"""Matrix products on CPUs: torch's oneDNN packs bfloat16 weights once, and each expert is one product.

Otherwise such weights would be packed again in every call, which for a few tokens costs as much as the product.
``gemm_avx512bf16`` multiplies where it can read what oneDNN packs; elsewhere oneDNN multiplies. On CPUs with AVX2 but
no bfloat16 instructions, where oneDNN has no fast product, ``gemm_avx2`` packs and multiplies.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_exec
from torch import Tensor, nn

from qnext_plugin.kernel_log import record
from qnext_plugin.ops.cpu import gemm_avx2 as avx2
from qnext_plugin.ops.cpu import gemm_avx512bf16
from qnext_plugin.ops.cpu.experts import routed_experts
from sglang_ext.compat import ON_CPU
from sglang_ext.cpu.stored import Weight

FOR_AVX2: bool = ON_CPU and avx2.available()
"""True if bfloat16 weights are packed for a CPU without bfloat16 instructions."""

PACKS: bool = FOR_AVX2 or (
    ON_CPU and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""True if bfloat16 weights are packed in this process; other CPUs use them as they are."""


class Packed:
    """Matrices of one size, packed by oneDNN, that replace ``weights`` [matrices, out, in]."""

    def __init__(self, weights: Tensor) -> None:
        self.matrices = [torch.ops.mkldnn._reorder_linear_weight(matrix) for matrix in weights]
        self.addresses, self.out_features = None, weights.shape[1]
        if gemm_avx512bf16.readable(self.matrices[0], *weights.shape[1:]):
            self.addresses = np.array([torch.ops.mkldnn.data_ptr(matrix) for matrix in self.matrices])

    def plain(self) -> Tensor:
        return torch.stack([matrix.to_dense() for matrix in self.matrices])

    def products(self, x: Tensor, used: Sequence[int], counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
        """Multiply consecutive parts of ``x``: its next ``counts[i]`` rows by matrix ``used[i]``."""
        if self.addresses is not None and bias is None and x.dtype == torch.bfloat16:
            record("products")
            return gemm_avx512bf16.products(x, self.addresses[used], counts, self.out_features)
        record("packed")
        product = torch.ops.mkldnn._linear_pointwise.default
        pairs = zip(x.split(counts), used, strict=True)
        parts = [product(part, self.matrices[i], bias, "none", [], "") for part, i in pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.products(x, [0], [len(x)], bias)

    def gate_up(self, x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return self.products(x.index_select(0, rows), used, counts)

    def down(self, x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return self.products(x.to(torch.bfloat16), used, counts)


class PackedForAvx2:
    """Matrices of one size, packed by ``ops.cpu.gemm_avx2``, that replace ``weights`` [matrices, out, in]."""

    def __init__(self, weights: Tensor) -> None:
        self.matrices, self.out_features = avx2.pack(weights), weights.shape[1]

    def plain(self) -> Tensor:
        return avx2.unpack(self.matrices, self.out_features)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        record("products")
        return avx2.linear(x, self.matrices, bias, self.out_features)

    def gate_up(self, x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        record("products")
        return avx2.products(x, self.matrices, used, counts, rows, torch.float32)[:, : self.out_features]

    def down(self, x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return avx2.products(x, self.matrices, used, counts)[:, : self.out_features]


class Plain:
    """Matrices that are not packed, in any data type."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def gate_up(self, x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return self.down(x.index_select(0, rows), used, counts)

    def down(self, x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        parts = zip(x.to(self.weights.dtype).split(counts), used, strict=True)
        return torch.cat([F.linear(part, self.weights[i]) for part, i in parts])


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Give ``model``'s weights their declared form inside this context, to load some or all; pack them afterwards."""
    for weight in stored_weights(model):
        weight.unpack()
    for param in model.parameters():
        if packed := param.__dict__.pop("packed", None):
            param.data = packed.plain().view(param.plain_shape)
    try:
        yield
    finally:
        _pack_all(model)


def stored_weights(model: nn.Module) -> Iterator[Weight]:
    for module in model.modules():
        yield from getattr(getattr(module, "quant_method", None), "weights", ())


def _pack_all(model: nn.Module) -> None:
    for weight in stored_weights(model):
        weight.pack()
    for module in model.modules() if PACKS else ():
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedFusedMoEMethod:
            pack(module.w13_weight)
            pack(module.w2_weight)
        elif method in (UnquantizedLinearMethod, PackedLinearMethod) or is_untied_head(module):
            pack(module.weight)
            module.quant_method = PackedLinearMethod()


def pack(param: nn.Parameter) -> None:
    """Replace the data of a bfloat16 [out, in] or [experts, out, in] by a packed form, ``param.packed``."""
    if param.dtype == torch.bfloat16 and not (FOR_AVX2 and param.shape[-1] % 2):
        param.plain_shape = param.shape
        param.packed = (PackedForAvx2 if FOR_AVX2 else Packed)(param.data.view(-1, *param.shape[-2:]))
        param.data = param.data.new_empty(0)


def is_untied_head(module: nn.Module) -> bool:
    """Return whether this is a head that computes in the model's dtype and is not tied.

    A tied head is also the embedding, whose rows are looked up.
    """
    method = type(getattr(module, "quant_method", None))
    untied = type(module) is ParallelLMHead and method is UnquantizedEmbeddingMethod
    return untied and not get_exec().features.enable_fp32_lm_head


class PackedLinearMethod(UnquantizedLinearMethod):
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed: Packed | PackedForAvx2 | None = getattr(layer.weight, "packed", None)
        return packed.linear(x, bias) if packed else F.linear(x, layer.weight, bias)


@cache
def register() -> None:
    """Make SGLang call ``moe_forward`` on this platform, through its extension point; idempotent."""
    BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, moe_forward, current_platform.get_dispatch_key_name())


def moe_forward(_: UnquantizedFusedMoEMethod, layer: nn.Module, dispatch_output: StandardDispatchOutput) -> Any:
    """Do what SGLang's ``moe_forward_native`` does for this model: experts with SiLU and without biases."""
    topk_weights, topk_ids, _ = dispatch_output.topk_output
    w13, w2 = (getattr(weight, "packed", None) or Plain(weight) for weight in (layer.w13_weight, layer.w2_weight))
    out = routed_experts(dispatch_output.hidden_states, topk_weights, topk_ids, w13.gate_up, w2.down)
    return StandardCombineInput(hidden_states=out)
