"""The modules of a checkpoint that one layer of the model holds, merged. Every list of them is derived from here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Section = int | str


@dataclass(frozen=True)
class Merged:
    """A merged layer.

    ``blocks`` are the parents that it occurs in. ``parts`` are the checkpoint's modules by the last segment of their
    names, with the sections of the layer's rows that each fills, in the terms of both engines' loaders. ``grouped``:
    the checkpoint may also store the layer whole under its own name, its rows grouped by key head (``layouts.py``).
    """

    blocks: tuple[str, ...]
    parts: Mapping[str, tuple[Section, ...]]
    grouped: bool = False

    @property
    def num_sections(self) -> int:
        return sum(len(sections) for sections in self.parts.values())


MERGED: Mapping[str, Merged] = MappingProxyType(
    {
        "qkv_proj": Merged(("self_attn",), {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}),
        "gate_up_proj": Merged(("mlp", "shared_expert"), {"gate_proj": (0,), "up_proj": (1,)}),
        "in_proj_qkvz": Merged(("linear_attn",), {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,)}, grouped=True),
        "in_proj_ba": Merged(("linear_attn",), {"in_proj_b": (0,), "in_proj_a": (1,)}, grouped=True),
    }
)
"""By the last segment of the layer's name."""

PARTS: Mapping[str, tuple[str, tuple[Section, ...]]] = MappingProxyType(
    {part: (layer, sections) for layer, merged in MERGED.items() for part, sections in merged.parts.items()}
)
"""The merged layer of each part, and the sections that the part fills."""

EXPERTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
)
"""The projections of a routed expert: the engines' stacked parameter that holds each, and its section there."""


def packed_modules(*, grouped: bool) -> dict[str, list[str]]:
    """The engines' ``packed_modules_mapping``; if ``grouped``, also for layers that are stored whole."""
    return {
        layer: [layer] if merged.grouped else list(merged.parts)
        for layer, merged in MERGED.items()
        if grouped or not merged.grouped
    }


def layer_of(module: str) -> str:
    """The layer that holds a module, both by their names in the checkpoint."""
    name = re.sub(r"\.experts\.\d+\.\w+$", ".experts", module)
    outer, _, last = name.rpartition(".")
    layer = PARTS[last][0] if last in PARTS else last
    return f"{outer}.{layer}" if outer else layer


def layer_name(module: str) -> str:
    """The layer that holds a module, by its name in the model or, for ``mtp.*``, in the draft."""
    return re.sub(r"^mtp\.", "model.", layer_of(module))


def modules_of(layer: str, num_experts: int) -> list[str]:
    """The modules that a checkpoint may store of a layer, in any form; both by their names in the checkpoint."""
    outer, _, last = layer.rpartition(".")
    if last == "experts":
        return [f"{layer}.{i}.{projection}" for i in range(num_experts) for projection in EXPERTS]
    names = [last, *MERGED[last].parts] if last in MERGED else [last]
    return [f"{outer}.{name}" if outer else name for name in names]
