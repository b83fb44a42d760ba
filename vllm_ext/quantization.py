"""Which layers are quantized: what the checkpoint stores decides, not the lists in its configuration.

A layer that cannot be served as stored has its weight dequantized while loading, and the log says why: shards stored
in different ways, packed words or blocks that straddle sections or ranks, and what vLLM has no kernel for.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qnext_plugin.checkpoint import quantized_layers
from qnext_plugin.checkpoint.headers import TensorInfo, read_headers
from qnext_plugin.checkpoint.quantization import Leaves, stored_modules
from qnext_plugin.checkpoint.quantized_layers import obstacle, quantized_parts
from qnext_plugin.config import QNextConfig

logger = init_logger("vllm.qnext_plugin")


def checkpoint_headers(vllm_config: VllmConfig) -> Mapping[str, TensorInfo] | None:
    """The headers of a safetensors checkpoint, local or on the hub; None where they cannot be had."""
    model, loading = vllm_config.model_config, vllm_config.load_config
    return _headers(model.model, model.revision) if loading.load_format in ("auto", "safetensors", "dummy") else None


@cache
def _headers(model: str, revision: str | None) -> Mapping[str, TensorInfo] | None:
    directory = Path(model)
    if directory.exists():
        return read_headers(directory) if any(directory.glob("*.safetensors")) else None
    found = get_safetensors_params_metadata(model, revision=revision)
    return {n: TensorInfo(tuple(t["shape"]), t["dtype"], Path(model)) for n, t in found.items()} or None


@cache
def _modules(model: str, revision: str | None) -> Mapping[str, Leaves]:
    return stored_modules(_headers(model, revision) or {})


def quantization_config(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """What the checkpoint says of its own quantization."""
    config = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    return config if config is None or isinstance(config, Mapping) else config.to_dict()


def stored_quantized(vllm_config: VllmConfig) -> Mapping[str, Leaves] | None:
    """All modules of a checkpoint that is quantized; None where it is not, or its headers cannot be had."""
    if quantization_config(vllm_config) is None or checkpoint_headers(vllm_config) is None:
        return None
    return _modules(vllm_config.model_config.model, vllm_config.model_config.revision)


def build(make: Callable[..., nn.Module], config: QNextConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """``make(prefix=, quant_config=)`` as the checkpoint stores the layer, or plain where it cannot be served so."""
    quant_config, stored = vllm_config.quant_config, stored_quantized(vllm_config)
    if quant_config is None or stored is None:
        return make(prefix=prefix, quant_config=quant_config)
    parts = quantized_parts(prefix, config, stored)
    if not parts:
        return make(prefix=prefix, quant_config=None)
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    return quantized_layers.build(
        partial(make, prefix=prefix),
        quant_config,
        obstacle(parts, config, quantization_config(vllm_config) or {}, tp_size),
        is_plain,
        engine="vLLM",
        must_be_stored=prefix.endswith(".experts") and not current_platform.is_cpu(),
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weights are floating-point."""
    method = getattr(getattr(layer, "routed_experts", layer), "quant_method", None)
    return method is None or isinstance(
        method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod | UnquantizedFusedMoEMethod
    )


def routed_experts(*args: Any, **kwargs: Any) -> RoutedExperts:
    """vLLM's ``RoutedExperts``; ``ValueError`` without a kernel for FP8, where vLLM fails only once they are loaded."""
    experts = RoutedExperts(*args, **kwargs)
    backend = getattr(experts.quant_method, "fp8_backend", None)
    if backend is not None and backend.name == "NONE":
        raise ValueError("No Fp8 MoE backend supports the deployment configuration.")
    return experts


def report(model: nn.Module, vllm_config: VllmConfig, *, draft: bool) -> None:
    """Log which modules are dequantized while loading, by reason."""
    for line in quantized_layers.reports(stored_quantized(vllm_config) or {}, model, is_plain, draft=draft):
        logger.info(line)


def dequantized(
    weights: Iterable[tuple[str, torch.Tensor]], model: nn.Module, vllm_config: VllmConfig
) -> Iterable[tuple[str, torch.Tensor]]:
    """Turn the stored tensors of each module whose layer of ``model`` is plain into one weight; pass the others on."""
    stored, quantization = stored_quantized(vllm_config), quantization_config(vllm_config)
    if stored is None or quantization is None:
        return weights
    redundant = vllm_config.parallel_config.eplb_config.num_redundant_experts

    def has_expert(layer: nn.Module, expert: int) -> bool:
        experts = layer.routed_experts
        copies = range(expert, experts.global_num_experts, experts.global_num_experts - redundant)
        return experts.expert_map is None or any(experts.expert_map[copy] >= 0 for copy in copies)

    dtype = vllm_config.model_config.dtype
    return quantized_layers.dequantized(weights, stored, quantization, model, is_plain, has_expert, dtype)
