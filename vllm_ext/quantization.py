"""Decides which layers are quantized, by what the checkpoint stores and not by the lists in its configuration.

The weight of a layer that cannot be served as stored is dequantized while loading, and the log gives the reason: its
shards are stored in different formats, packed words or blocks cross sections or ranks, or vLLM has no kernel for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from vllm._custom_ops import cpu_has_amx_fp8
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
    resolve_quant_method,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform

from qnext_plugin.checkpoint import quantized_layers
from qnext_plugin.checkpoint.dequantization import scale_name
from qnext_plugin.checkpoint.formats import FORMATS, Leaves, stored_format
from qnext_plugin.checkpoint.headers import Shape
from qnext_plugin.checkpoint.quantization import is_quantized
from qnext_plugin.checkpoint.quantized_layers import Engine, choose_method, view_of, without_exclusions
from qnext_plugin.checkpoint.schema import weight_shapes
from qnext_plugin.checkpoint.stored import Checkpoint, read_served
from qnext_plugin.config import QNextConfig
from vllm_ext.compat import has_cpu_wna16
from vllm_ext.config import quantization_of

logger = init_logger("vllm.qnext_plugin")


def read_checkpoint(vllm_config: VllmConfig) -> Checkpoint:
    """Return the checkpoint to load, with its quantization settings as vLLM reads them, overrides included."""
    model, loading = vllm_config.model_config, vllm_config.load_config
    found = read_served(model.model, model.revision, loading.load_format, loading.download_dir)
    return replace(found, quantization=quantization_of(vllm_config))


def layer_quantization(
    checkpoint: Checkpoint, config: QNextConfig, vllm_config: VllmConfig
) -> QuantizationConfig | None:
    """Return our layers' ``quant_config``: vLLM's own, unless we know how the checkpoint stores each layer."""
    engine_config = vllm_config.quant_config
    if engine_config is None or checkpoint.quantized is None:
        return engine_config
    return view_of(
        engine_config,
        ByCheckpoint,
        checkpoint=checkpoint,
        config_of_model=config,
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        dtype=vllm_config.model_config.dtype,
        shapes=weight_shapes(config),
        engine_config=without_exclusions(engine_config),
        # vLLM would apply this (quantization by flags) to every answer of ours. ``engine_config`` keeps it, so that it
        # applies only to layers that are served as stored.
        online_quantization_config=None,
        # ``Attention`` would let this choose the cache's type; ``config.choose_cache_dtype`` has already done so.
        kv_cache_scheme=None,
    )


class ByCheckpoint:
    """A mixin that answers for each layer from the checkpoint; it precedes the class of vLLM's configuration."""

    checkpoint: Checkpoint
    config_of_model: QNextConfig
    tp_size: int
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    engine_config: QuantizationConfig

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase | VocabParallelEmbedding | RoutedExperts):
            method = self.engine_config.get_quant_method(layer, prefix)
            if method is None and prefix in self.checkpoint.cache_scales:
                return BaseKVCacheMethod(self.engine_config)
            return method
        parts = self.checkpoint.parts(prefix, self.config_of_model.num_experts)
        if not parts:
            return plain_method(layer)
        reason = self.checkpoint.obstacle(parts, self.config_of_model, self.tp_size) or missing_kernel(parts, layer)
        if takes_codes(self.dtype):
            try:
                return self.method_of_codes(layer, parts)
            except ValueError as e:
                reason = str(e)
        return choose_method(
            VLLM,
            layer,
            reason,
            partial(engine_method, self.engine_config, layer, prefix),
            quantization=self.engine_config.get_name(),
            must_be_stored=isinstance(layer, RoutedExperts) and not current_platform.is_cpu(),
        )

    def method_of_codes(self, layer: nn.Module, parts: Mapping[str, Leaves]) -> QuantizeMethodBase:
        """Return the method for a layer that is served in codes; raise ``ValueError`` if it cannot be."""
        from vllm_ext.cpu.stored import StoredExpertsMethod, StoredLinearMethod  # they import Numba

        experts = isinstance(layer, RoutedExperts)
        codes = self.checkpoint.codes(parts, self.shapes, layer.moe_config.tp_size if experts else self.tp_size)
        return StoredExpertsMethod(layer.moe_config, codes) if experts else StoredLinearMethod(codes)


def takes_codes(dtype: torch.dtype) -> bool:
    """Return whether quantized weights of a model in ``dtype`` are for the products compiled for CPUs."""
    if not current_platform.is_cpu() or dtype != torch.bfloat16:
        return False
    from qnext_plugin.ops.cpu import stored  # it imports Numba, which only CPUs need

    return stored.serves()


def missing_kernel(modules: Mapping[str, Leaves], layer: nn.Module) -> str | None:
    """Return why quantized modules cannot be served as stored where vLLM would try, and fail later or take minutes."""
    if not current_platform.is_cpu():
        return None
    stored = {name: leaves for name, leaves in modules.items() if is_quantized(leaves)}
    if stored and isinstance(layer, RoutedExperts) and layer.moe_config.moe_parallel_config.use_ep:
        return "vLLM's products of quantized experts fail on a CPU at the first token if a rank has a part of them"
    formats = {stored_format(leaves) for leaves in stored.values()}
    if "fp8" in formats and not all(map(has_cpu_fp8, stored.values())):
        return "vLLM has no compiled product of FP8 weights with such scales for this CPU"
    if formats & {"mxfp8", "mxfp4"}:
        return "vLLM has no kernel for exponents as scales on a CPU"
    if not has_cpu_wna16() and any(FORMATS[name].in_words for name in formats):
        return "vLLM's operators for this CPU lack cpu_gemm_wna16, which is built for AVX512 only"
    return None


def has_cpu_fp8(leaves: Leaves) -> bool:
    """Return whether vLLM multiplies a module stored in FP8 by compiled code on this CPU.

    Otherwise it may take ``torch._scaled_mm``, which needs minutes for a product that takes milliseconds in bfloat16.
    """
    by_row = leaves[scale_name(leaves)].shape[:1] == leaves["weight"].shape[:1]
    return torch.cpu._is_amx_tile_supported() and (cpu_has_amx_fp8() or not by_row)


def engine_method(quant_config: QuantizationConfig, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
    """Return vLLM's choice; raise ``ValueError`` for FP8 experts without a kernel; vLLM fails only after loading."""
    method = resolve_quant_method(quant_config, layer, prefix)
    backend = getattr(method, "fp8_backend", None)
    if backend is not None and backend.name == "NONE":
        raise ValueError("No Fp8 MoE backend supports the deployment configuration.")
    return method


def plain_method(layer: nn.Module) -> QuantizeMethodBase:
    """Return vLLM's method for a layer whose weight is floating-point."""
    if isinstance(layer, RoutedExperts):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()


PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
VLLM = Engine("vLLM", PLAIN_METHODS, plain_method)
is_plain = VLLM.is_plain


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model``, keyed by the name of the layer whose weights they hold."""
    return {name.removesuffix(".routed_experts"): module for name, module in model.named_modules()}


def report(model: nn.Module, checkpoint: Checkpoint, *, draft: bool) -> None:
    """Log which modules are dequantized while loading, by reason."""
    for line in quantized_layers.reports(checkpoint, quantizable(model), is_plain, draft=draft):
        logger.info(line)


def converted(
    weights: Iterable[tuple[str, torch.Tensor]], model: nn.Module, checkpoint: Checkpoint, vllm_config: VllmConfig
) -> Iterable[tuple[str, torch.Tensor]]:
    """Turn a module's stored tensors into those that its layer in ``model`` holds; pass the others on."""
    redundant = vllm_config.parallel_config.eplb_config.num_redundant_experts

    def has_expert(experts: nn.Module, expert: int) -> bool:
        copies = range(expert, experts.global_num_experts, experts.global_num_experts - redundant)
        return experts.expert_map is None or any(experts.expert_map[copy] >= 0 for copy in copies)

    dtype = vllm_config.model_config.dtype
    return quantized_layers.converted(weights, checkpoint, quantizable(model), is_plain, has_expert, dtype)
