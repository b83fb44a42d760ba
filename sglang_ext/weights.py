"""Maps names and rows of a checkpoint to our parameters."""

from collections.abc import Iterable, Iterator

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from qnext_plugin.checkpoint.cache_scales import for_attention
from qnext_plugin.checkpoint.coverage import RefusedUpdate
from qnext_plugin.checkpoint.layouts import KINDS, section_sizes, ungroup
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.merged import EXPERTS, PARTS, layer_name
from qnext_plugin.checkpoint.quantized_layers import holds_codes
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig
from sglang_ext.quantization import converted, is_plain

SHARED_WITH_TRUNK = {"model.embed_tokens.weight", "lm_head.weight"}


def load_weights(
    model: nn.Module,
    config: QNextConfig,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    complete: bool,
) -> set[str]:
    """Load the trunk's tensors from a stream with checkpoint names; return the names of the loaded parameters.

    ``complete`` means that the stream holds all tensors: a parameter without a value then raises ``ValueError``.
    """
    trunk = ((name, tensor) for name, tensor in weights if is_trunk(name, config))
    plain = converted(for_attention(trunk), model, checkpoint)
    return _load(model, config, checkpoint, plain, complete, set())


def load_draft_weights(
    model: nn.Module,
    config: QNextConfig,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    complete: bool,
) -> set[str]:
    """Load ``mtp.*`` in the same way; SGLang gives the draft the trunk's embedding and head."""
    draft = ((name, tensor) for name, tensor in weights if name.split(".")[0] == "mtp")
    plain = converted(for_attention(draft), model, checkpoint)
    renamed = ((f"model.{name.removeprefix('mtp.')}", tensor) for name, tensor in plain)
    return _load(model, config, checkpoint, renamed, complete, SHARED_WITH_TRUNK)


def _load(
    model: nn.Module,
    config: QNextConfig,
    checkpoint: Checkpoint,
    weights: Iterable[tuple[str, torch.Tensor]],
    complete: bool,
    optional: set[str],
) -> set[str]:
    params, layers = dict(model.named_parameters()), dict(model.named_modules())
    loaded = set()
    for name, tensor in weights:
        if layer_name(name.rpartition(".")[0]) not in layers:
            continue  # it is on another pipeline stage
        for param_name, rows, args in placements(name, tensor, config):
            if param_name in params:
                param = params[param_name]
                getattr(param, "weight_loader", default_weight_loader)(param, rows, *args)
                loaded.add(param_name)
            elif param_name.endswith((".attn.k_scale", ".attn.v_scale")):
                raise RefusedUpdate(
                    f"{name} found, but the served checkpoint has no such scale; start with the new one"
                )
    scaled = {name.rpartition(".")[0] for name in loaded if name.endswith((".attn.k_scale", ".attn.v_scale"))}
    for layer in () if complete else scaled:
        # It copies scales to where the kernels read them; SGLang does not call it for updates from tensors.
        layers[layer].quant_method.process_weights_after_loading(layers[layer])
    # A layer that the engine quantizes has parameters that only some checkpoints store.
    missing = {
        name
        for name in params.keys() - loaded - optional
        if is_plain(layer := layers[name.rpartition(".")[0]]) or holds_codes(layer)
    }
    if complete and missing:
        raise ValueError(f"the checkpoint leaves parameters without a value: {', '.join(collapse(sorted(missing)))}")
    return loaded


def is_trunk(name: str, config: QNextConfig) -> bool:
    """Return whether a tensor is the trunk's: no draft's, no stored copy of a tied head, no RoPE frequencies."""
    parts = name.split(".")
    tied_head = parts[0] == "lm_head" and config.tie_word_embeddings
    return parts[0] != "mtp" and not tied_head and parts[-2:] != ["rotary_emb", "inv_freq"]


def placements(
    name: str, tensor: torch.Tensor, config: QNextConfig
) -> Iterator[tuple[str, torch.Tensor, tuple[object, ...]]]:
    """Yield where a checkpoint tensor goes: our parameter's name, its rows, and more arguments for its loader."""
    module, _, leaf = name.rpartition(".")
    *outer, last = module.split(".")
    prefix = ".".join(outer)
    if outer[-2:-1] == ["experts"]:  # mlp.experts.7.up_proj.weight
        expert, experts = int(outer[-1]), ".".join(outer[:-1])
        param, shard = EXPERTS[last]
        yield _expert(experts, f"{param}_{leaf}", tensor, shard, expert)
    elif last == "experts":  # mlp.experts.gate_up_proj, [experts, rows, columns]
        for expert, rows in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = rows.chunk(2)
                yield _expert(module, "w13_weight", gate, "w1", expert)
                yield _expert(module, "w13_weight", up, "w3", expert)
            else:
                yield _expert(module, "w2_weight", rows, "w2", expert)
    elif last in KINDS:
        yield name, ungroup(tensor, config.gdn, KINDS[last], leaf), ()
    elif last in PARTS:
        layer, sections = PARTS[last]
        shards = (tensor,) if len(sections) == 1 else _sections(tensor, config, layer, len(sections))
        for section, rows in zip(sections, shards, strict=True):
            yield f"{prefix}.{layer}.{leaf}", rows, (section,)
    else:
        yield name, tensor, ()
        if name == "model.embed_tokens.weight" and config.tie_word_embeddings:
            yield "lm_head.weight", tensor, ()


def _expert(
    module: str, param: str, rows: torch.Tensor, shard: str, expert: int
) -> tuple[str, torch.Tensor, tuple[object, ...]]:
    name = f"{module}.{param}"
    return name, rows, (name, shard, expert)


def _sections(tensor: torch.Tensor, config: QNextConfig, layer: str, count: int) -> tuple[torch.Tensor, ...]:
    """Return the first ``count`` sections of an input projection's rows."""
    return tensor.split(section_sizes(config.gdn, KINDS[layer])[:count])
