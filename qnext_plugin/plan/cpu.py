"""Compute what a CPU's memory holds while a model is loaded, and what it delivers in each decoding step.

Decoding reads every weight that a step needs once, so the rate of memory bounds the tokens per second.
"""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from qnext_plugin.checkpoint.headers import TensorInfo, describe
from qnext_plugin.checkpoint.merged import layer_of, parameter_of
from qnext_plugin.checkpoint.quantization import is_quantized
from qnext_plugin.checkpoint.schema import weight_shapes
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.plan.sizes import Serving

RESERVE = 4.0
"""GiB that the system and an engine's processes take beside weights and caches."""


def installed_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def held(checkpoint: Checkpoint, serving: Serving, *, in_codes: bool) -> Mapping[str, TensorInfo] | None:
    """Return the headers of the tensors that a CPU holds; None without headers.

    Quantized weights are held ``in_codes``, except those that the compiled products cannot take; all others plain.
    """
    if checkpoint.quantized is None or checkpoint.headers is None:
        return checkpoint.headers
    shapes, layers = weight_shapes(serving.config) | weight_shapes(serving.config.draft), {}
    for module, leaves in checkpoint.quantized.items():
        layers.setdefault(layer_of(module), {})[module] = leaves
    found = dict(checkpoint.headers)
    for parts in layers.values():
        quantized = [module for module, leaves in parts.items() if is_quantized(leaves)]
        codes = {}
        if in_codes and quantized and serving.dtype == torch.bfloat16:
            with suppress(ValueError):  # the products cannot take it
                codes = checkpoint.codes(parts, shapes, serving.tp_size)
        for module in quantized:
            for leaf in parts[module]:
                del found[f"{module}.{leaf}"]
            shape = shapes[f"{module}.weight"]
            one = codes.get(parameter_of(module))
            tensors = one.zeros(*shape) if one else {"weight": torch.empty(shape, dtype=serving.dtype)}
            found |= {f"{module}.{leaf}": describe(tensor) for leaf, tensor in tensors.items()}
    return found


def largest_layer(serving: Serving, headers: Mapping[str, TensorInfo] | None) -> int:
    """Return the bytes of the largest layer of weights, of which a second copy exists while it is packed."""
    sizes: Counter[str] = Counter()
    for name, size in serving.tensors(headers):
        sizes[layer_of(name.rpartition(".")[0])] += int(size)
    return max(sizes.values())


@dataclass(frozen=True)
class Decoding:
    """The memory traffic of decoding steps of a model on all ranks of one machine, in bytes.

    ``headers`` are those of the tensors that are held. ``state_bytes`` are those of one sequence's state in all Gated
    DeltaNet layers of a rank.
    """

    serving: Serving
    headers: Mapping[str, TensorInfo] | None
    state_bytes: int

    def step(self, sequences: int, context: int = 0) -> int:
        """Return the bytes of one step of ``sequences`` sequences that have ``context`` tokens each.

        With drafts it is a step that drafts and verifies all of them. Routing is taken as uniform: that reads the most
        experts. Activations stay in the processor's caches.
        """
        config, drafts = self.serving.config, self.serving.num_draft_tokens
        total = 0.0
        for name, size in self.serving.tensors(self.headers):
            parts = name.split(".")
            if "embed_tokens" in parts and not config.tie_word_embeddings:
                continue  # a row for each token
            is_draft = parts[0] == "mtp"
            if "experts" in parts:
                width = config.draft.num_experts if is_draft else config.num_experts
                rows = sequences if is_draft else sequences * (1 + drafts)
                size *= 1 - (1 - config.num_experts_per_tok / width) ** rows
            if is_draft:
                size *= drafts
            elif {"lm_head", "embed_tokens"} & {*parts}:
                size *= 1 + drafts
            total += size
        states = self.state_bytes * (2 + drafts)  # one is read; one is written for each token
        caches = self.serving.kv_bytes_per_token * context
        return self.serving.tp_size * int(total + sequences * (states + caches))
