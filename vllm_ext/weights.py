"""Maps names and rows of a checkpoint to our parameters."""

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from qnext_plugin.checkpoint.cache_scales import for_attention
from qnext_plugin.checkpoint.layouts import KINDS, ungroup
from qnext_plugin.checkpoint.merged import MERGED, layer_name, layer_of
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig
from vllm_ext.quantization import converted

# Patterns start and end with a dot, so that they match only whole segments.
STACKED = WeightsMapper(
    orig_to_new_stacked={
        f".{block}.{part}.": (f".{block}.{layer}.", sections if len(sections) > 1 else sections[0])
        for layer, merged in MERGED.items()
        for block in merged.blocks
        for part, sections in merged.parts.items()
    }
)


def check_checkpoint(
    checkpoint: Checkpoint,
    config: QNextConfig,
    vllm_config: VllmConfig,
    mtp: Literal["required", "optional"] = "optional",
) -> bool:
    """Compare a checkpoint's safetensors headers with what the config implies, before any weight is read.

    Return whether the headers were available; if not, ``check_stream`` compares the tensors as they are loaded.
    """
    if checkpoint.headers is None:
        return False
    if vllm_config.model_config.runner_type == "pooling":
        # vLLM knows a classifier's own head (``score``); classifiers and embedding models need no ``lm_head``.
        headers = {name: info for name, info in checkpoint.headers.items() if name.split(".")[0] != "score"}
        checkpoint, config = replace(checkpoint, headers=headers), replace(config, tie_word_embeddings=True)
    checkpoint.check(config, mtp)
    return True


def load_weights(
    model: nn.Module,
    config: QNextConfig,
    vllm_config: VllmConfig,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Load the trunk's tensors from a stream with checkpoint names; return the names of the loaded parameters."""
    layers = {name for name, _ in model.named_modules()}
    trunk = ((name, tensor) for name, tensor in weights if is_trunk(name) and is_here(name, layers))
    plain = converted(for_attention(trunk), model, checkpoint, vllm_config)
    return _load(model, config, flatten(plain, config))


def load_draft_weights(
    model: nn.Module,
    config: QNextConfig,
    vllm_config: VllmConfig,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Load ``mtp.*``, and the embedding and head, which the draft shares with the trunk or holds a copy of."""
    draft = ((name, tensor) for name, tensor in weights if is_draft(name))
    plain = converted(for_attention(draft), model, checkpoint, vllm_config)
    return _load(model, config, ((re.sub(r"^mtp\.", "model.", name), tensor) for name, tensor in plain))


def is_trunk(name: str) -> bool:
    return name.split(".")[0] != "mtp"


def is_here(name: str, layers: Container[str]) -> bool:
    """Return whether a tensor belongs to no layer or to one of ``layers``; others are on another pipeline stage."""
    return not name.startswith("model.layers.") or layer_name(name.rpartition(".")[0]) in layers


def is_draft(name: str) -> bool:
    return not is_trunk(name) or name.startswith(("model.embed_tokens.", "lm_head."))


def unit(name: str) -> str:
    """Return the module of ours that a checkpoint's tensor is part of, or its name if it is a parameter by itself."""
    layer = layer_of(name.rpartition(".")[0])
    return name if layer.endswith(".linear_attn") else layer


def _load(model: nn.Module, config: QNextConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    stored = _tied(weights) if config.tie_word_embeddings else weights
    return AutoWeightsLoader(model).load_weights(stored, mapper=STACKED)


def _tied(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the embedding on as head too, whether a head is stored or not: on CPUs vLLM packs the head separately."""
    for name, tensor in weights:
        if name.split(".")[0] != "lm_head":
            yield name, tensor
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor


def flatten(weights: Iterable[tuple[str, torch.Tensor]], config: QNextConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Reorder the rows of the input projections from grouped by key head to flat; pass other tensors on."""
    for name, tensor in weights:
        module, _, suffix = name.rpartition(".")
        kind = KINDS.get(module.rpartition(".")[2])
        yield name, tensor if kind is None else ungroup(tensor, config.gdn, kind, suffix)
