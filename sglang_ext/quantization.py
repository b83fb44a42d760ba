"""Decides which layers are quantized, by what the checkpoint stores and not by the lists in its configuration.

The weight of a layer that cannot be served as stored is dequantized while loading, and the log gives the reason. On a
CPU these are all layers: SGLang's package from PyPI has no quantized kernels for CPUs.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from sglang.srt.runtime_context import get_model, get_parallel
from torch import nn

from qnext_plugin.checkpoint import quantized_layers
from qnext_plugin.checkpoint.cache_scales import asks_for_fp8_cache
from qnext_plugin.checkpoint.formats import Leaves, stored_format
from qnext_plugin.checkpoint.headers import Shape
from qnext_plugin.checkpoint.quantization import is_quantized
from qnext_plugin.checkpoint.quantized_layers import Engine, choose_method, view_of, without_exclusions
from qnext_plugin.checkpoint.schema import weight_shapes
from qnext_plugin.checkpoint.stored import MODELOPT_FILE, Checkpoint, read_served
from qnext_plugin.config import QNextConfig
from sglang_ext.compat import ON_CPU, uses_expert_location

logger = logging.getLogger(__name__)


class DequantizedConfig(QuantizationConfig):
    """The stand-in for every quantization on a CPU: no layer is quantized, and any floating-point type serves."""

    def get_name(self) -> str:
        return "dequantized"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [MODELOPT_FILE]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DequantizedConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        return None

    def get_scaled_act_names(self) -> list[str]:
        return []


_updates: list[Checkpoint] = []


@contextmanager
def loading_from(checkpoint: Checkpoint) -> Iterator[None]:
    """Make ``being_loaded`` return another checkpoint inside this context."""
    _updates.append(checkpoint)
    try:
        yield
    finally:
        _updates.pop()


def being_loaded(served: Checkpoint) -> Checkpoint:
    """Return the checkpoint that weights come from: that of an update, or the ``served`` one."""
    return _updates[-1] if _updates else served


def read_checkpoint(path: str | None = None) -> Checkpoint:
    """Return the checkpoint to load: the server's, or the one at ``path`` for an update."""
    model = get_model()
    if path is not None:
        return read_served(path, None, "auto", model.download_dir)
    return read_served(model.model_path, model.revision, model.load_format, model.download_dir)


def layer_quantization(
    checkpoint: Checkpoint, config: QNextConfig, quant_config: QuantizationConfig | None
) -> QuantizationConfig | None:
    """Return our layers' ``quant_config``: SGLang's own, unless we know how the checkpoint stores each layer.

    Raise ``ValueError`` on a CPU if we do not know it, because no layer could be dequantized.
    """
    if quant_config is None:
        return None
    if checkpoint.quantized is None:
        if ON_CPU:
            raise ValueError(
                "no quantized safetensors checkpoint found, expected one: on a CPU weights are dequantized while "
                "loading and never quantized; download it and give its directory, or drop --quantization"
            )
        return quant_config
    return view_of(
        quant_config,
        ByCheckpoint,
        checkpoint=checkpoint,
        config_of_model=config,
        shapes=weight_shapes(config),
        engine_config=without_exclusions(quant_config),
    )


class ByCheckpoint:
    """A mixin that answers for each layer from the checkpoint; it precedes the class of SGLang's configuration."""

    checkpoint: Checkpoint
    config_of_model: QNextConfig
    shapes: Mapping[str, Shape]
    engine_config: QuantizationConfig

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase | VocabParallelEmbedding | FusedMoE):
            method = self.engine_config.get_quant_method(layer, prefix)
            if method is None and prefix in self.checkpoint.cache_scales:
                return BaseKVCacheMethod(self.engine_config)
            return method
        parts = self.checkpoint.parts(prefix, self.config_of_model.num_experts)
        if not parts:
            return plain_method(layer)
        reason = None
        if ON_CPU:
            try:
                return self.method_of_codes(layer, parts, prefix)
            except ValueError as e:
                reason = str(e)
        else:
            reason = missing_method(parts) or self.checkpoint.obstacle(
                parts, self.config_of_model, self.tp_size(prefix)
            )
        return choose_method(
            SGLANG,
            layer,
            reason,
            partial(self.engine_config.get_quant_method, layer, prefix),
            quantization=self.engine_config.get_name(),
            must_be_stored=isinstance(layer, FusedMoE) and not ON_CPU,
        )

    def method_of_codes(self, layer: nn.Module, parts: Mapping[str, Leaves], prefix: str) -> QuantizeMethodBase:
        """Return the method for a layer that is served in codes; raise ``ValueError`` if it cannot be."""
        from qnext_plugin.ops.cpu import stored  # it imports Numba, which only CPUs need
        from sglang_ext.cpu.stored import StoredExpertsMethod, StoredLinearMethod

        if not stored.serves():
            raise ValueError("SGLang has no kernel for it on this CPU")
        if torch.get_default_dtype() != torch.bfloat16:
            raise ValueError("the compiled products compute in bfloat16")
        if isinstance(layer, FusedMoE):
            return StoredExpertsMethod(self.checkpoint.codes(parts, self.shapes, layer.moe_tp_size))
        return StoredLinearMethod(self.checkpoint.codes(parts, self.shapes, self.tp_size(prefix)))

    def tp_size(self, prefix: str) -> int:
        return get_parallel().tp_size if ".mlp." in prefix else get_parallel().attn_tp_size


def missing_method(parts: Mapping[str, Leaves]) -> str | None:
    """Return why SGLang cannot serve modules as stored on a GPU, where it would fail or leave them without a weight."""
    found = {(stored_format(leaves), "weight_packed" in leaves) for leaves in parts.values() if is_quantized(leaves)}
    if found & {("mxfp8", False), ("mxfp4", True)}:  # Quark's MXFP4 has other names
        return "SGLang has no method for the MX formats of compressed-tensors"
    if ("mxfp4", False) in found:  # what it does after loading is imported there only
        return "SGLang has a method for the MXFP4 of Quark on AMD's GPUs only"
    return None


def plain_method(layer: nn.Module) -> QuantizeMethodBase | None:
    """Return SGLang's method for a layer with a floating-point weight; None for experts, which make it themselves."""
    if isinstance(layer, FusedMoE):
        return None
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else UnquantizedEmbeddingMethod()


PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
SGLANG = Engine("SGLang", PLAIN_METHODS, plain_method, lambda layer: {"weight_loader": layer.weight_loader})
is_plain = SGLANG.is_plain


def experts_quantization(quant_config: QuantizationConfig | None, prefix: str) -> QuantizationConfig | None:
    """Return the ``quant_config`` for a layer's experts: None where they are stored plain.

    SGLang's expert layers ask the configuration itself what they hold, not only the method that it gives them.
    """
    if isinstance(quant_config, ByCheckpoint):
        parts = quant_config.checkpoint.parts(prefix, quant_config.config_of_model.num_experts)
        return quant_config if parts else None
    return quant_config


def quantization_of_projection(
    checkpoint: Checkpoint, quant_config: QuantizationConfig | None
) -> QuantizationConfig | None:
    """Return the ``quant_config`` of a draft's input projection: None if the checkpoint is known to be plain.

    Quantizing it while loading would only make drafts worse, and SGLang's own model does not do it either.
    """
    plain = checkpoint.headers is not None and checkpoint.quantization is None
    return None if plain else quant_config


def cache_note(checkpoint: Checkpoint, cache_dtype: str) -> tuple[str, str] | None:
    """Return what to know of a CPU if keys and values are not in FP8 though the checkpoint asks for it, and a flag."""
    if ON_CPU and cache_dtype == "auto" and asks_for_fp8_cache(checkpoint.quantization):
        return "keys and values are not kept in FP8 on a CPU by default", "--kv-cache-dtype fp8_e4m3"
    return None


def report(model: nn.Module, checkpoint: Checkpoint, *, draft: bool) -> None:
    """Log which modules are dequantized while loading, by reason, and what differs from what the checkpoint asks."""
    note = cache_note(checkpoint, get_model().kv_cache_dtype)
    if note and not draft:
        logger.info("%s; for that: %s", *note)
    for line in quantized_layers.reports(checkpoint, dict(model.named_modules()), is_plain, draft=draft):
        logger.info(line)


def converted(
    weights: Iterable[tuple[str, torch.Tensor]], model: nn.Module, checkpoint: Checkpoint
) -> Iterable[tuple[str, torch.Tensor]]:
    """Turn a module's stored tensors into those that its layer in ``model`` holds; pass the others on."""

    def has_expert(experts: nn.Module, expert: int) -> bool:
        location = get_global_expert_location_metadata()
        first = experts.moe_ep_rank * experts.num_local_experts
        copies = (
            [expert]
            if location is None or not uses_expert_location(experts)
            else location.logical_to_all_physical(experts.layer_id, expert)
        )
        return any(first <= copy < first + experts.num_local_experts for copy in copies)

    layers, dtype = dict(model.named_modules()), torch.get_default_dtype()
    return quantized_layers.converted(weights, checkpoint, layers, is_plain, has_expert, dtype)
