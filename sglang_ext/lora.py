"""Checks the LoRA adapters that SGLang reads against the model, and puts their rows in the order of our weights.

``process_weight`` and ``normalize_weights`` replace methods of SGLang (``compat.REPLACEMENTS``), so that a model that
has ``prepare_adapter`` sees the tensors of an adapter before they are sorted and stacked.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.lora.lora import LoRAAdapter
from torch import Tensor, nn

from qnext_plugin.checkpoint.layouts import KINDS, section_sizes, ungroup
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.lora import check_adapter
from qnext_plugin.checkpoint.merged import EXPERTS, layer_of, packed_modules
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig
from sglang_ext.compat import ON_CPU

PREFIX = "base_model.model."
# SGLang stacks the modules of a group; where an adapter has one of them, it expects most of the others.
GROUPS = packed_modules(grouped=False)


def hidden_dim(config: QNextConfig, module: str, layer_idx: int, tp_size: int) -> tuple[int, int]:
    """Return (inputs, outputs) of a module of ours by the last segment of its name; routed experts are one module.

    SGLang divides the outputs by ``tp_size`` for modules that it does not know to be whole on every rank.
    """
    hidden, head = config.hidden_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * head, config.num_key_value_heads * head
    sparse = config.is_sparse(layer_idx)
    intermediate = config.shared_expert_intermediate_size if sparse else config.intermediate_size
    sizes = {
        "in_proj_qkvz": (hidden, sum(section_sizes(config.gdn, "qkvz"))),
        "in_proj_ba": (hidden, sum(section_sizes(config.gdn, "ba"))),
        "out_proj": (config.gdn.value_dim, hidden),
        "qkv_proj": (hidden, 2 * (q_dim + kv_dim)),
        "o_proj": (q_dim, hidden),
        "gate": (hidden, config.num_experts * tp_size),
        "shared_expert_gate": (hidden, tp_size),
        "gate_up_proj": (hidden, 2 * intermediate),
        "down_proj": (intermediate, hidden),
        "gate_up_proj_moe": (hidden, 2 * config.moe_intermediate_size),
        "down_proj_moe": (config.moe_intermediate_size, hidden),
    }
    if module not in sizes:
        raise ValueError(
            f"LoRA target module {module!r} found, which `all` includes, expected some of {sorted(sizes)}: name those "
            "to adapt in --lora-target-modules"
        )
    return sizes[module]


def process_weight(original: Callable[..., None], adapter: Any, name: str, tensor: Tensor) -> None:
    """Wrap ``LoRAAdapter._process_weight``: only keep the tensor for ``normalize_weights``."""
    if hasattr(adapter.base_model, "prepare_adapter"):
        adapter.__dict__.setdefault("tensors_read", {})[name] = tensor.cpu()
    else:
        original(adapter, name, tensor)


def normalize_weights(original: Callable[..., None], adapter: Any) -> None:
    """Wrap ``LoRAAdapter._normalize_weights``: first let the model prepare the tensors."""
    if hasattr(adapter.base_model, "prepare_adapter"):
        adapter.base_model.prepare_adapter(adapter, adapter.__dict__.pop("tensors_read", {}))
    original(adapter)


def prepare(config: QNextConfig, model: nn.Module, adapter: LoRAAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Give ``adapter`` its tensors; raise ``ValueError`` for an adapter that cannot be served.

    ``lora_B`` of the input projections is put in flat order, and zeros complete the groups that SGLang stacks.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    left_out, settings = set(), adapter.config.hf_config
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(PREFIX)
        if name.startswith("mtp."):  # the draft is served without adapters
            continue
        module, _, part = name.rpartition(".lora_")
        if part not in ("A.weight", "B.weight") or module == "lm_head" or not_adapted(module):
            left_out.add(module or name)
        modules.setdefault(module, {})[part[:1]] = tensor
    if left_out:
        raise ValueError(
            f"{listing('adapter changes what SGLang cannot adapt here, modules', sorted(left_out))}; these are the "
            "embedding, the head, what is no linear layer, and on a CPU the routed experts: merge it into the weights"
        )
    if found := [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]:
        raise ValueError(f"adapter has {', '.join(found)}, which SGLang ignores; merge it into the weights")
    pairs = {module: (parts.get("A"), parts.get("B")) for module, parts in modules.items()}
    check_adapter(config, pairs)
    check_served(model, modules)
    rank, weights = adapter.config.r, expected_tensors(config, mtp=False)
    if settings.get("use_rslora"):
        adapter.scaling = adapter.config.lora_alpha / math.sqrt(rank)
    for module, (a, b) in pairs.items():
        assert a is not None and b is not None
        if a.shape[0] != rank:
            raise ValueError(
                f"adapter has rank {a.shape[0]} in {module}, and {rank} in adapter_config.json: its two files do not "
                "belong together"
            )
        outer, _, last = module.rpartition(".")
        if kind := KINDS.get(last):
            b = ungroup(b, config.gdn, kind, "lora_B.weight")
        if kind == "ba":  # one A for each section; SGLang repeats only that of in_proj_qkvz itself
            a = a.repeat(2, 1)
        put(adapter, module, a, b)
        group = next((group for group in GROUPS.values() if last in group), [])
        if ".experts." in module:
            group = list(EXPERTS)
        for other in (f"{outer}.{part}" for part in group):
            if other not in pairs:
                rows, inputs = weights[f"{other}.weight"]
                put(adapter, other, torch.zeros(rank, inputs, dtype=a.dtype), torch.zeros(rows, rank, dtype=b.dtype))
    # This also replaces "all-linear", for which SGLang knows only some of our modules.
    names = {name for layer in adapter.layers for name in layer.weights}
    adapter.config.target_modules = sorted({name.split(".")[-3] for name in names})


def not_adapted(module: str) -> bool:
    """Return whether this is a routed expert on a CPU or, as in `transformers` 5, all experts of a layer at once."""
    _, *rest = module.split(".experts")
    return bool(rest) and (ON_CPU or not rest[0][1:2].isdigit())


def check_served(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ``ValueError`` for modules that a started server does not adapt: SGLang would leave them out."""
    layers = dict(model.named_modules())
    adapted = {name for name, layer in layers.items() if isinstance(layer, BaseLayerWithLoRA)}
    missing = [
        module
        for module in modules
        if (layer := layer_of(module)).rpartition(".")[0] in layers and layer not in adapted
    ]
    if adapted and missing:
        raise ValueError(
            f"{listing('adapter changes what this server was not started to adapt, modules', missing)}; name them in "
            "--lora-target-modules"
        )


def put(adapter: LoRAAdapter, module: str, a: Tensor, b: Tensor) -> None:
    layer = adapter.layers[int(module.split(".")[2])]
    layer.weights |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
