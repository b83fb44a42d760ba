"""Matrix products on CPUs without AMX: bfloat16 weights are packed once, for vLLM's kernels or for compiled ones.

With AVX512-BF16 we use kernels that vLLM itself uses only on CPUs with AMX. Without AMX, vLLM uses oneDNN for linear
layers, which is slower for few tokens, and a float32 kernel for experts, which is slower for any number. With AVX2 but
no bfloat16 instructions, where oneDNN has no fast product either, we use ``qnext_plugin.ops.cpu.gemm_avx2``. One packed
weight replaces the plain one and serves prefill and decode. Only a draft's head is packed a second time, in int8.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as engine_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from qnext_plugin.config import QNextConfig
from qnext_plugin.kernel_log import record
from vllm_ext.compat import lacks_bfloat16
from vllm_ext.cpu.expert_ids import local_experts

BLOCK = 32
"""Both sizes of a packed matrix are multiples of this."""


def packs() -> bool:
    """Return whether bfloat16 weights are packed here; AMX and zentorch have their own kernels."""
    return not current_platform.is_zen_cpu() and (packs_for_vllm() or packs_for_avx2())


def packs_for_vllm() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def packs_for_avx2() -> bool:
    return lacks_bfloat16() and compiled_products().available()


def compiled_products() -> Any:
    from qnext_plugin.ops.cpu import operators  # it imports Numba, which only some CPUs need

    return operators


def choose_gemms(model: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> None:
    """Make every layer of ``model`` that can be packed pack its weights after loading, and none copy an embedding."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(module) is VocabParallelEmbedding:
            if type(method) is UnquantizedEmbeddingMethod:
                module.quant_method = LookUpMethod()
            continue
        if not packs():
            continue
        if type(module) is ParallelLMHead and not packs_head(config, vllm_config):
            continue
        if type(method) is UnquantizedFusedMoEMethod:
            if method.experts_cls is CPUUnquantizedExperts and method.moe.in_dtype == torch.bfloat16:
                method.experts_cls = PackedExperts if packs_for_vllm() else CompiledExperts
        elif type(method) in PACKED and fits(module.weight):
            module.quant_method = PACKED[type(method)]()


def packs_head(config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Return whether a head is packed: a tied one is also the embedding, and for other dtypes vLLM reads the weight."""
    return packs() and not config.tie_word_embeddings and vllm_config.model_config.head_dtype == torch.bfloat16


def choose_draft_head(head: ParallelLMHead, config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Give a draft its own int8 head instead of the target's where possible; return whether it has one."""
    chosen = packs_for_vllm() and packs_head(config, vllm_config)
    if chosen := chosen and type(head.quant_method) is UnquantizedEmbeddingMethod and fits(head.weight):
        head.quant_method = DraftHeadMethod()
    return chosen


def fits(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.dim() == 2 and not any(size % BLOCK for size in weight.shape)


def pack(layer: nn.Module, name: str) -> None:
    """Replace the parameter ``name``, [..., out, in], by its packed form, which has the same shape."""
    packed = torch.ops._C.convert_weight_packed if packs_for_vllm() else compiled_products().pack
    replace_parameter(layer, name, packed(getattr(layer, name)))


def pack_linear(layer: nn.Module) -> None:
    pack(layer, "weight")
    # vLLM calls this with the layer's weight. It keeps no weight itself, so that a compiled graph uses the new weight
    # when weights are loaded again.
    layer.cpu_linear = packed_linear if packs_for_vllm() else compiled_products().linear_operator


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    return engine_ops.weight_packed_linear_cpu(x, weight, weight.shape[0], bias)


class PackedLinearMethod(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pack_linear(layer)


class PackedHeadMethod(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pack_linear(layer)


class LookUpMethod(UnquantizedEmbeddingMethod):
    """An embedding, of which vLLM would keep a second copy that is packed for products."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: rows are only looked up."""


class DraftHeadMethod(UnquantizedEmbeddingMethod):
    """A draft's head in int8 with a scale for each row.

    A head reads more bytes than the draft's layer, and int8 halves them. Rounding may change which of two nearly
    equally likely tokens is drafted; the target verifies drafts with its own head.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        parts = [per_row_int8(rows) for rows in layer.weight.split(8192)]  # in parts, as each becomes float32
        weight, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        replace_parameter(layer, "weight", torch.ops._C.convert_weight_packed(weight))
        layer.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
        record("draft head: int8")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops._C.int8_scaled_mm_with_quant(x, layer.weight, layer.weight_scale, bias, x.dtype, True)


def per_row_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``weight`` [rows, in] as int8, and a scale for each row."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # rows that pad the vocabulary are zero
    return (weight / scale[:, None]).round().to(torch.int8), scale


PACKED = {UnquantizedLinearMethod: PackedLinearMethod, UnquantizedEmbeddingMethod: PackedHeadMethod}


class PackedExperts(CPUUnquantizedExperts):
    """SwiGLU experts without biases; vLLM's class pads their sizes and determines which are supported."""

    name = "packed"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._pad_moe_intermediate(layer)
        pack(layer, "w13_weight")
        pack(layer, "w2_weight")
        record(f"experts: {self.name}")  # not in ``apply``: it is traced, and its graph would undo other records

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        self.multiply(output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map)

    def multiply(
        self, out: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None
    ) -> None:
        weights, ids = local_experts(expert_map, weights, ids)
        no_scales_zeros_or_blocks = (None,) * 5
        method = engine_ops.CPUQuantMethod.UNQUANT
        engine_ops.fused_experts_cpu(out, x, w13, w2, weights, ids, method, *no_scales_zeros_or_blocks)


class CompiledExperts(PackedExperts):
    name = "compiled"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.operator = compiled_products().experts_operator

    def multiply(
        self, out: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None
    ) -> None:
        out.copy_(self.operator(x, w13, w2, weights, ids if expert_map is None else expert_map[ids.long()]))
