"""Which layers are quantised: what the checkpoint stores decides, not the lists in its configuration.

A layer that cannot be served as stored has its weight dequantised while loading, and the log says why: shards stored
in different ways, packed words or blocks that straddle sections or ranks, and what vLLM has no kernel for.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qnext_plugin.checkpoint import TensorInfo, collapse, read_headers
from qnext_plugin.config import QNextConfig
from qnext_plugin.layouts import FP8_BLOCK, KINDS, can_ungroup
from qnext_plugin.quantization import SCALES, Leaves, dequantise, is_quantised, layout_method, storage, stored_modules

logger = init_logger("vllm.qnext_plugin")

# Modules of the checkpoint that one layer of ours holds, by the last segment of its name.
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_ba", "in_proj_b", "in_proj_a"),
}
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
# The lists of modules to leave alone that vLLM's configurations of the various methods hold.
_EXCLUSIONS = (
    *("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"),
    "modules_in_block_to_quantize",  # a list of those to quantise, where empty means all
)


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
    """What the checkpoint says of its own quantisation."""
    config = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    return config if config is None or isinstance(config, Mapping) else config.to_dict()


def stored_quantised(vllm_config: VllmConfig) -> Mapping[str, Leaves] | None:
    """All modules of a checkpoint that is quantised; None where it is not, or its headers cannot be had."""
    if quantization_config(vllm_config) is None or checkpoint_headers(vllm_config) is None:
        return None
    return _modules(vllm_config.model_config.model, vllm_config.model_config.revision)


def build(make: Callable[..., nn.Module], config: QNextConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """``make(prefix=, quant_config=)`` as the checkpoint stores the layer, or plain where it cannot be served so."""
    quant_config, stored = vllm_config.quant_config, stored_quantised(vllm_config)
    if quant_config is None or stored is None:
        return make(prefix=prefix, quant_config=quant_config)
    parts = {name: stored[name] for name in _parts(prefix, config) if name in stored}
    if not any(is_quantised(leaves) for leaves in parts.values()):
        return make(prefix=prefix, quant_config=None)
    obstacle = _obstacle(parts, config, vllm_config)
    if obstacle is None:
        try:
            layer = make(prefix=prefix, quant_config=_without_exclusions(quant_config))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as e:
            if prefix.endswith(".experts") and not current_platform.is_cpu():
                raise  # dequantised, most of the model would not fit where it was meant to
            obstacle = f"vLLM: {' '.join(str(e).split())}"
        else:
            if not is_plain(layer):
                return layer
            obstacle = f"vLLM has no {quant_config.get_name()} method for it"
    layer = make(prefix=prefix, quant_config=None)
    layer.dequantised = obstacle  # for report
    return layer


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
    """Log which modules are dequantised while loading, by reason."""
    layers = dict(model.named_modules())
    reasons: dict[str, list[str]] = {}
    for name, leaves in (stored_quantised(vllm_config) or {}).items():
        layer = layers.get(layer_name(name))
        if is_quantised(leaves) and layer is not None and is_plain(layer) and name.startswith("mtp.") == draft:
            reasons.setdefault(getattr(layer, "dequantised", "has no quantised form here"), []).append(name)
    for reason, names in reasons.items():
        logger.info("dequantised while loading: %s (%s)", "; ".join(collapse(names)), reason)


def dequantised(
    weights: Iterable[tuple[str, torch.Tensor]], model: nn.Module, vllm_config: VllmConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Turn the stored tensors of each module whose layer of ``model`` is plain into one weight; pass the others on."""
    stored, quantization = stored_quantised(vllm_config), quantization_config(vllm_config)
    if stored is None or quantization is None:
        yield from weights
        return
    layers = dict(model.named_modules())
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        leaves = stored.get(module, {})
        layer = layers.get(layer_name(module)) if leaf in leaves and is_quantised(leaves) else None
        plain_already = leaf == "weight" and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if layer is None or not is_plain(layer) or plain_already:
            yield name, tensor
            continue
        parts = held.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) == len(leaves):
            weight = dequantise(held.pop(module), quantization)
            yield f"{module}.weight", weight.to(vllm_config.model_config.dtype)


def _parts(prefix: str, config: QNextConfig) -> list[str]:
    """Names that the checkpoint may use for what the layer holds."""
    outer, _, last = prefix.rpartition(".")
    if last == "experts":
        projections = ("gate_proj", "up_proj", "down_proj")
        return [f"{prefix}.{i}.{name}" for i in range(config.num_experts) for name in projections]
    return [f"{outer}.{name}" if outer else name for name in PARTS.get(last, (last,))]


def layer_name(module: str) -> str:
    """The layer of ours that holds a module of the checkpoint."""
    name = re.sub(r"\.experts\.\d+\.\w+$", ".experts", re.sub(r"^mtp\.", "model.", module))
    outer, _, last = name.rpartition(".")
    merged = next((ours for ours, parts in PARTS.items() if last in parts), last)
    return f"{outer}.{merged}" if outer else merged


def _obstacle(parts: Mapping[str, Leaves], config: QNextConfig, vllm_config: VllmConfig) -> str | None:
    """Why modules that make up one layer cannot be served as stored, as far as that is known without vLLM."""
    if len({storage(leaves) for leaves in parts.values()}) > 1:
        return "its parts are stored in different ways"
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    method = layout_method(quantization_config(vllm_config) or {})
    for name, leaves in parts.items():
        last = name.rpartition(".")[2]
        if last in KINDS:
            shapes = {leaf: info.shape for leaf, info in leaves.items()}
            if not can_ungroup(shapes, config.gdn, KINDS[last], method):
                return "a packed word or block holds rows of several sections"
        elif ".experts." not in name:
            ranks = min(tp_size, config.num_key_value_heads) if last in ("k_proj", "v_proj") else tp_size
            if not _splits(leaves, ranks, by_inputs=last in _ROW_PARALLEL, merged=len(parts) > 1):
                return f"a block or group with one scale would be split among {tp_size} ranks or joined with another's"
    return None


def _splits(leaves: Leaves, ranks: int, by_inputs: bool, merged: bool) -> bool:
    """Whether each rank's share of a module is a whole number of its blocks, or groups of inputs.

    vLLM checks this for some methods and layers only; for the others it fails while loading.
    """
    scale = next(leaves[name].shape for name in SCALES if name in leaves)
    weight = leaves["weight"].shape if "weight" in leaves else ()
    if len(scale) == 2 and weight and scale[0] != weight[0]:  # blocks
        return (ranks == 1 and not merged) or weight[by_inputs] % (FP8_BLOCK * ranks) == 0
    if len(scale) == 2 and by_inputs:
        groups = scale[0] if "scales" in leaves else scale[1]
        return groups == 1 or groups % ranks == 0
    return True


def _without_exclusions(quant_config: QuantizationConfig) -> QuantizationConfig:
    """A copy that quantises every layer it is given: whether to is decided already."""
    view = copy.copy(quant_config)
    for name in _EXCLUSIONS:
        if hasattr(view, name):
            setattr(view, name, [])
    if hasattr(view, "dynamic"):  # GPTQ: patterns with settings of their own, or with a minus to leave alone
        view.dynamic = {pattern: value for pattern, value in view.dynamic.items() if not pattern.startswith("-:")}
    if hasattr(view, "lm_head_quantized"):
        view.lm_head_quantized = True
    return view
