"""The checkpoint's modules that the model merges into one layer. Every list of them is derived from this file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Section = int | str


@dataclass(frozen=True)
class Merged:
    """A merged layer.

    ``blocks`` are the names of its possible parents. ``parts`` maps the last segment of each checkpoint module's name
    to the sections of the layer's rows that the module fills, named as in both engines' loaders. If ``grouped``, the
    checkpoint may also store the layer whole under the layer's name, with rows grouped by key head (``layouts.py``).
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
"""The keys are the last segments of the layers' names."""

PARTS: Mapping[str, tuple[str, tuple[Section, ...]]] = MappingProxyType(
    {part: (layer, sections) for layer, merged in MERGED.items() for part, sections in merged.parts.items()}
)
"""This maps each part to its merged layer and the sections that the part fills."""

EXPERTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
)
"""This maps each projection of a routed expert to the engines' stacked parameter and to its section there."""


def packed_modules(*, grouped: bool) -> dict[str, list[str]]:
    """Return the engines' ``packed_modules_mapping``; if ``grouped``, with the layers that may be stored whole."""
    return {
        layer: [layer] if merged.grouped else list(merged.parts)
        for layer, merged in MERGED.items()
        if grouped or not merged.grouped
    }


def layer_of(module: str) -> str:
    """Return the name of the layer that holds a module; both names are those of the checkpoint."""
    name = re.sub(r"\.experts\.\d+\.\w+$", ".experts", module)
    outer, _, last = name.rpartition(".")
    layer = PARTS[last][0] if last in PARTS else last
    return f"{outer}.{layer}" if outer else layer


def layer_name(module: str) -> str:
    """Return the name of the layer that holds a module, as named in the model or, for ``mtp.*``, in the draft."""
    return re.sub(r"^mtp\.", "model.", layer_of(module))


def modules_of(layer: str, num_experts: int) -> list[str]:
    """Return the names of all modules that a checkpoint may store for a layer, in any form.

    All names are those of the checkpoint.
    """
    outer, _, last = layer.rpartition(".")
    if last == "experts":
        return [f"{layer}.{i}.{projection}" for i in range(num_experts) for projection in EXPERTS]
    names = [last, *MERGED[last].parts] if last in MERGED else [last]
    return [f"{outer}.{name}" if outer else name for name in names]


def parameter_of(module: str) -> str:
    """Return what a layer's parameters for a module begin with: ``w13`` or ``w2`` for an expert, else nothing."""
    return EXPERTS[module.rpartition(".")[2]][0] if ".experts." in module else ""
