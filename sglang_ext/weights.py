"""From checkpoint names and rows to our parameters."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_model
from torch import nn

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.layouts import ungroup
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.quantization import check_quantization, layout_method
from qnext_plugin.checkpoint.quantized_layers import layer_name
from qnext_plugin.checkpoint.schema import check_coverage
from qnext_plugin.config import QNextConfig
from sglang_ext.quantization import dequantized, is_plain, quantization_config, stored_quantized

# Module names of the checkpoint whose rows are a part of another module's.
STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "in_proj_z": ("in_proj_qkvz", 3),
    "in_proj_b": ("in_proj_ba", 0),
    "in_proj_a": ("in_proj_ba", 1),
}
EXPERT_SHARDS = {"gate_proj": ("w13_", "w1"), "up_proj": ("w13_", "w3"), "down_proj": ("w2_", "w2")}


SHARED_WITH_TRUNK = {"model.embed_tokens.weight", "lm_head.weight"}


def check_checkpoint(config: QNextConfig, mtp: Literal["required", "optional"] = "optional") -> bool:
    """Compare a local safetensors checkpoint's headers with what the config promises, before a weight is read.

    Returns whether there was such a checkpoint; one that the loader is yet to fetch is left to ``check_stream``.
    """
    directory = Path(get_model().model_path)
    local = get_model().load_format in ("auto", "safetensors") and any(directory.glob("*.safetensors"))
    if local:
        check_directory(config, directory, mtp)
    return local


def check_directory(config: QNextConfig, directory: Path, mtp: Literal["required", "optional"]) -> None:
    """``ValueError`` where the headers of a safetensors checkpoint do not fit the configuration, or each other."""
    headers = read_headers(directory)
    check_coverage(config, headers, mtp=mtp)
    check_quantization(headers, quantization_config(directory))


def load_weights(
    model: nn.Module,
    config: QNextConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    complete: bool,
) -> set[str]:
    """Load the trunk's tensors from a stream in checkpoint names; returns the parameters loaded.

    ``complete``: the stream holds all of them, so that a parameter left without a value is a ``ValueError``.
    """
    trunk = ((name, tensor) for name, tensor in weights if is_trunk(name, config))
    return _load(model, config, dequantized(trunk, model), complete, set())


def load_draft_weights(
    model: nn.Module, config: QNextConfig, weights: Iterable[tuple[str, torch.Tensor]], *, complete: bool
) -> set[str]:
    """The same for ``mtp.*``; SGLang hands the draft the trunk's embedding and head."""
    draft = ((name, tensor) for name, tensor in weights if name.split(".")[0] == "mtp")
    renamed = ((f"model.{name.removeprefix('mtp.')}", tensor) for name, tensor in dequantized(draft, model))
    return _load(model, config, renamed, complete, SHARED_WITH_TRUNK)


def _load(
    model: nn.Module,
    config: QNextConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    complete: bool,
    optional: set[str],
) -> set[str]:
    params, layers = dict(model.named_parameters()), dict(model.named_modules())
    loaded, stored = set(), stored_quantized()
    quant_method = None if stored is None else layout_method(stored.config)
    for name, tensor in weights:
        if layer_name(name.rpartition(".")[0]) not in layers:
            continue  # another pipeline stage's
        for param_name, rows, args in placements(name, tensor, config, quant_method):
            if param_name in params:
                param = params[param_name]
                getattr(param, "weight_loader", default_weight_loader)(param, rows, *args)
                loaded.add(param_name)
    # A quantized layer has parameters that only some checkpoints store.
    missing = {name for name in params.keys() - loaded - optional if is_plain(layers[name.rpartition(".")[0]])}
    if complete and missing:
        raise ValueError(f"the checkpoint leaves parameters without a value: {', '.join(collapse(sorted(missing)))}")
    return loaded


def is_trunk(name: str, config: QNextConfig) -> bool:
    """Neither the draft's, nor a tied head stored all the same, nor what follows from the configuration."""
    parts = name.split(".")
    tied_head = parts[0] == "lm_head" and config.tie_word_embeddings
    return parts[0] != "mtp" and not tied_head and parts[-2:] != ["rotary_emb", "inv_freq"]


def placements(
    name: str, tensor: torch.Tensor, config: QNextConfig, quant_method: str | None
) -> Iterator[tuple[str, torch.Tensor, tuple[object, ...]]]:
    """Where a checkpoint tensor goes: our parameter's name, the rows for it, what its loader has to know besides."""
    module, _, leaf = name.rpartition(".")
    *outer, last = module.split(".")
    prefix = ".".join(outer)
    if outer[-2:-1] == ["experts"]:  # mlp.experts.7.up_proj.weight
        expert, experts = int(outer[-1]), ".".join(outer[:-1])
        kind, shard = EXPERT_SHARDS[last]
        yield _expert(experts, kind + leaf, tensor, shard, expert)
    elif last == "experts":  # mlp.experts.gate_up_proj, [experts, rows, columns]
        for expert, rows in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = rows.chunk(2)
                yield _expert(module, "w13_weight", gate, "w1", expert)
                yield _expert(module, "w13_weight", up, "w3", expert)
            else:
                yield _expert(module, "w2_weight", rows, "w2", expert)
    elif last in ("in_proj_qkvz", "in_proj_ba"):
        kind = "qkvz" if last == "in_proj_qkvz" else "ba"
        yield name, ungroup(tensor, config.gdn, kind, leaf, quant_method), ()
    elif last == "in_proj_qkv":
        sizes = [config.gdn.key_dim, config.gdn.key_dim, config.gdn.value_dim]
        for shard_id, rows in enumerate(tensor.split(sizes)):
            yield f"{prefix}.in_proj_qkvz.{leaf}", rows, (shard_id,)
    elif last in STACKED:
        stacked, shard_id = STACKED[last]
        yield f"{prefix}.{stacked}.{leaf}", tensor, (shard_id,)
    else:
        yield name, tensor, ()
        if name == "model.embed_tokens.weight" and config.tie_word_embeddings:
            yield "lm_head.weight", tensor, ()


def _expert(
    module: str, param: str, rows: torch.Tensor, shard: str, expert: int
) -> tuple[str, torch.Tensor, tuple[object, ...]]:
    name = f"{module}.{param}"
    return name, rows, (name, shard, expert)
