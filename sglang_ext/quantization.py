"""Which layers are quantized: what the checkpoint stores decides, not the lists in its configuration.

A layer that cannot be served as stored has its weight dequantized while loading, and the log says why. On a CPU that is
every one: SGLang's package from PyPI has no quantized kernels for it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from sglang.srt.runtime_context import get_model, get_parallel
from torch import nn

from qnext_plugin.checkpoint import quantized_layers
from qnext_plugin.checkpoint.headers import TensorInfo, read_headers
from qnext_plugin.checkpoint.metadata import read_metadata
from qnext_plugin.checkpoint.quantization import Leaves, stored_modules
from qnext_plugin.checkpoint.quantized_layers import obstacle, quantized_parts
from qnext_plugin.config import QNextConfig, read_config
from sglang_ext.compat import ON_CPU, uses_expert_location

logger = logging.getLogger(__name__)

_MODELOPT = "hf_quant_config.json"  # where ModelOpt writes what others write in config.json


@dataclass(frozen=True)
class Stored:
    """A quantized checkpoint: the tensors of every module, and what it says of its own quantization."""

    modules: Mapping[str, Leaves]
    config: Mapping[str, Any]


class DequantizedConfig(QuantizationConfig):
    """What stands for every quantization on a CPU: no layer has a quantized form, any floating-point type serves."""

    def get_name(self) -> str:
        return "dequantized"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [_MODELOPT]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DequantizedConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        return None

    def get_scaled_act_names(self) -> list[str]:
        return []


_updates: list[Stored | None] = []


@contextmanager
def loading_from(stored: Stored | None) -> Iterator[None]:
    """Meanwhile the weights that are loaded are those of another checkpoint, of one that is not quantized if None."""
    _updates.append(stored)
    try:
        yield
    finally:
        _updates.pop()


def stored_quantized() -> Stored | None:
    """The checkpoint that is loaded, if it is quantized and its headers can be had, local or on the hub."""
    if _updates:
        return _updates[-1]
    model = get_model()
    return _served(model.model_path, model.revision) if model.load_format in ("auto", "safetensors", "dummy") else None


def read_stored(model: str, revision: str | None = None) -> Stored | None:
    """A checkpoint, local or on the hub, if it is quantized and its headers can be had."""
    directory = Path(model)
    headers: Mapping[str, TensorInfo] | None
    if directory.is_dir():
        config = quantization_config(directory)
        headers = read_headers(directory) if config and any(directory.glob("*.safetensors")) else None
    else:
        try:
            metadata = read_metadata(model, revision)
        except OSError:
            return None
        config, headers = metadata.config.get("quantization_config"), metadata.headers
    return None if config is None or headers is None else Stored(stored_modules(headers), config)


def quantization_config(directory: Path) -> Mapping[str, Any] | None:
    """What a local checkpoint says of its own quantization."""
    for name, key in (("config.json", "quantization_config"), (_MODELOPT, "quantization")):
        raw = read_config(directory / name) if (directory / name).exists() else {}
        if key in raw:
            return raw[key] if key == "quantization_config" else raw
    return None


_served = cache(read_stored)


def build(
    make: Callable[..., nn.Module], config: QNextConfig, quant_config: QuantizationConfig | None, prefix: str
) -> nn.Module:
    """``make(prefix=, quant_config=)`` as the checkpoint stores the layer, or plain where it cannot be served so."""
    if quant_config is None:
        return make(prefix=prefix, quant_config=None)
    stored = stored_quantized()
    if stored is None:
        if ON_CPU:
            raise ValueError(
                "no quantized safetensors checkpoint found, expected one: on a CPU weights are dequantized while "
                "loading and never quantized; download it and give its directory, or drop --quantization"
            )
        return make(prefix=prefix, quant_config=quant_config)
    parts = quantized_parts(prefix, config, stored.modules)
    if not parts:
        return make(prefix=prefix, quant_config=None)
    tp_size = get_parallel().tp_size if ".mlp." in prefix else get_parallel().attn_tp_size
    return quantized_layers.build(
        partial(make, prefix=prefix),
        quant_config,
        "SGLang has no kernel for it on this CPU" if ON_CPU else obstacle(parts, config, stored.config, tp_size),
        is_plain,
        engine="SGLang",
        must_be_stored=prefix.endswith(".experts"),
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weights are floating-point."""
    method = getattr(layer, "quant_method", None)
    return method is None or isinstance(
        method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod | UnquantizedFusedMoEMethod
    )


def report(model: nn.Module, *, draft: bool) -> None:
    """Log which modules are dequantized while loading, by reason."""
    stored = stored_quantized()
    for line in quantized_layers.reports(stored.modules if stored else {}, model, is_plain, draft=draft):
        logger.info(line)


def dequantized(weights: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Turn the stored tensors of each module whose layer of ``model`` is plain into one weight; pass the others on."""
    stored = stored_quantized()
    if stored is None:
        return weights

    def has_expert(experts: nn.Module, expert: int) -> bool:
        location = get_global_expert_location_metadata()
        first = experts.moe_ep_rank * experts.num_local_experts
        copies = (
            [expert]
            if location is None or not uses_expert_location(experts)
            else location.logical_to_all_physical(experts.layer_id, expert)
        )
        return any(first <= copy < first + experts.num_local_experts for copy in copies)

    dtype = torch.get_default_dtype()
    return quantized_layers.dequantized(weights, stored.modules, stored.config, model, is_plain, has_expert, dtype)
