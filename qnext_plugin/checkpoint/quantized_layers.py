"""Which of a model's layers can be served as their modules are stored, and the dequantized weights of the others.

A layer holds one module of the checkpoint or several, merged. It cannot be served as stored where its parts are stored
in different ways, where packed words or blocks straddle sections or ranks, or where the engine has no kernel for it.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qnext_plugin.checkpoint.layouts import FP8_BLOCK, KINDS, can_ungroup
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.quantization import SCALES, Leaves, dequantize, is_quantized, layout_method, storage
from qnext_plugin.config import QNextConfig

Config = TypeVar("Config")

# Modules of the checkpoint that one layer holds, by the last segment of its name.
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_ba", "in_proj_b", "in_proj_a"),
}
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
# The lists of modules to leave alone that both engines' configurations of the various methods hold.
_EXCLUSIONS = (
    *("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"),
    "modules_in_block_to_quantize",  # a list of those to quantize, where empty means all
)


def quantized_parts(prefix: str, config: QNextConfig, stored: Mapping[str, Leaves]) -> dict[str, Leaves]:
    """The modules that the checkpoint stores of a layer; empty where none of them is quantized.

    ``prefix`` is the layer's name with ``mtp`` for the draft, ``stored`` the checkpoint's modules.
    """
    outer, _, last = prefix.rpartition(".")
    if last == "experts":
        projections = ("gate_proj", "up_proj", "down_proj")
        names = [f"{prefix}.{i}.{name}" for i in range(config.num_experts) for name in projections]
    else:
        names = [f"{outer}.{name}" if outer else name for name in PARTS.get(last, (last,))]
    parts = {name: stored[name] for name in names if name in stored}
    return parts if any(is_quantized(leaves) for leaves in parts.values()) else {}


def layer_name(module: str) -> str:
    """The layer, by its name in the model or the draft, that holds a module of the checkpoint."""
    name = re.sub(r"\.experts\.\d+\.\w+$", ".experts", re.sub(r"^mtp\.", "model.", module))
    outer, _, last = name.rpartition(".")
    merged = next((ours for ours, parts in PARTS.items() if last in parts), last)
    return f"{outer}.{merged}" if outer else merged


def obstacle(
    parts: Mapping[str, Leaves], config: QNextConfig, quantization_config: Mapping[str, Any], tp_size: int
) -> str | None:
    """Why modules that make up one layer cannot be served as stored, as far as that is known without the engine."""
    if len({storage(leaves) for leaves in parts.values()}) > 1:
        return "its parts are stored in different ways"
    method = layout_method(quantization_config)
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

    The engines check this for some methods and layers only; for the others they fail while loading.
    """
    scale = next(leaves[name].shape for name in SCALES if name in leaves)
    weight = leaves["weight"].shape if "weight" in leaves else ()
    if len(scale) == 2 and weight and scale[0] != weight[0]:  # blocks
        return (ranks == 1 and not merged) or weight[by_inputs] % (FP8_BLOCK * ranks) == 0
    if len(scale) == 2 and by_inputs:
        groups = scale[0] if "scales" in leaves else scale[1]
        return groups == 1 or groups % ranks == 0
    return True


def without_exclusions(quant_config: Config) -> Config:
    """A copy of an engine's configuration that quantizes every layer it is given: whether to is decided already."""
    view: Any = copy.copy(quant_config)
    for name in _EXCLUSIONS:
        if hasattr(view, name):
            setattr(view, name, [])
    if hasattr(view, "dynamic"):  # GPTQ: patterns with settings of their own, or with a minus to leave alone
        view.dynamic = {pattern: value for pattern, value in view.dynamic.items() if not pattern.startswith("-:")}
    if hasattr(view, "lm_head_quantized"):
        view.lm_head_quantized = True
    return view


def build(
    make: Callable[..., nn.Module],
    quant_config: Any,
    reason: str | None,
    is_plain: Callable[[nn.Module], bool],
    *,
    engine: str,
    must_be_stored: bool,
) -> nn.Module:
    """``make(quant_config=)`` as the checkpoint stores the layer, or plain for a ``reason``: one given, or an engine's.

    The engine's errors are raised if the layer ``must_be_stored``: dequantized it would not fit where it was meant to.
    """
    if reason is None:
        try:
            layer = make(quant_config=without_exclusions(quant_config))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as e:
            if must_be_stored:
                raise
            reason = f"{engine}: {' '.join(str(e).split())}"
        else:
            if not is_plain(layer):
                return layer
            reason = f"{engine} has no {quant_config.get_name()} method for it"
    layer = make(quant_config=None)
    layer.dequantized = reason  # for reports
    return layer


def reports(
    stored: Mapping[str, Leaves], model: nn.Module, is_plain: Callable[[nn.Module], bool], *, draft: bool
) -> list[str]:
    """Lines that say which modules of the model or ``draft`` are dequantized while loading, one for each reason."""
    found: dict[str, list[str]] = {}
    layers = dict(model.named_modules())
    for name, leaves in stored.items():
        layer = layers.get(layer_name(name))
        if layer is not None and is_quantized(leaves) and name.startswith("mtp.") == draft and is_plain(layer):
            found.setdefault(getattr(layer, "dequantized", "has no quantized form here"), []).append(name)
    return [f"dequantized while loading: {'; '.join(collapse(names))} ({why})" for why, names in found.items()]


def dequantized(
    weights: Iterable[tuple[str, Tensor]],
    stored: Mapping[str, Leaves],
    quantization_config: Mapping[str, Any],
    model: nn.Module,
    is_plain: Callable[[nn.Module], bool],
    has_expert: Callable[[nn.Module, int], bool],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Turn the stored tensors of each module whose layer of ``model`` ``is_plain`` into one weight; pass the others on.

    Experts that this rank's layer has not (``has_expert``) are left out. ``ValueError`` at the end for modules of which
    a part came.
    """
    held: dict[str, dict[str, Tensor]] = {}
    layers = dict(model.named_modules())
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        plain_already = leaf == "weight" and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        leaves, layer = stored.get(module, {}), layers.get(layer_name(module))
        if plain_already or leaf not in leaves or not is_quantized(leaves) or layer is None or not is_plain(layer):
            yield name, tensor
            continue
        expert = re.search(r"\.experts\.(\d+)\.", module)
        if expert and not has_expert(layer, int(expert[1])):
            continue
        parts = held.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) == len(leaves):
            yield f"{module}.weight", dequantize(held.pop(module), quantization_config).to(dtype)
    if held:
        raise ValueError(f"tensors are missing of quantized modules: {'; '.join(collapse(held))}; send them together")
