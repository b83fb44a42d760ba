"""Operators of a layer's forward pass that only move data."""

import math
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qnext_plugin.verify.scenarios import Scenario, tokens
from vllm_ext.tools.engine import Engine

MOVES = {"aten::copy_", "aten::cat", "aten::index", "aten::index_select", "aten::_index_put_impl_"}
PROMPT, BATCH = 150, 7


def size(event: Any) -> int:
    """Elements of what is written to, or read from."""
    shapes = [shape for shape in event.input_shapes if shape and all(isinstance(n, int) for n in shape)]
    return max((math.prod(shape) for shape in shapes[:1]), default=sys.maxsize)


def layer_of(event: Any) -> str | None:
    while event is not None and not event.name.startswith("layer "):
        event = event.cpu_parent
    return event.name if event else None


def count(engine: Engine) -> dict[str, Any]:
    """The largest number of moves in a layer, by the layer's mixer, for a prompt and for a decode step, what multiplies
    by the weights of which modules, and the type of the router's logits.

    Conversions between data types count: they are copies too.
    """
    layers = engine.worker.model_runner.model.model.layers
    hidden_size = engine.worker.model_runner.model.config.hidden_size
    for i, layer in enumerate(layers):

        def forward(*args: Any, forward: Any = layer.forward, name: str = f"layer {i}") -> Any:
            with record_function(name):
                return forward(*args)

        layer.forward = forward
    found: dict[str, dict[str, int]] = {}
    batches = {"prefill": ((tokens(PROMPT, seed=1),), 1), "decode": (tuple(tokens(1, i) for i in range(BATCH)), 2)}
    for phase, (batch, max_tokens) in batches.items():
        scenario = Scenario((batch,), max_tokens=(max_tokens,))
        engine.generate(batch, scenario)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
            engine.generate(batch, scenario)
        steps = max_tokens
        rows = PROMPT if phase == "prefill" else BATCH
        counts: dict[str, int] = {}
        for event in events.events():
            name = layer_of(event)
            if name and event.name in MOVES and size(event) >= rows * hidden_size:
                counts[name] = counts.get(name, 0) + 1
        found[phase] = {}
        for i, layer in enumerate(layers):
            mixer = "full_attention" if layer.full_attention else "linear_attention"
            most = found[phase].get(mixer, 0)
            found[phase][mixer] = max(most, math.ceil(counts.get(f"layer {i}", 0) / steps))
    methods: dict[str, set[str]] = {}
    for name, module in engine.worker.model_runner.model.named_modules():
        if hasattr(module, "quant_method"):
            methods.setdefault(type(module.quant_method).__name__, set()).add(name.rpartition(".")[2])
    report: dict[str, Any] = {"moves": found, "methods": {m: sorted(n) for m, n in methods.items()}}
    report["router"] = str(layers[0].mlp.gate(torch.ones(1, hidden_size, dtype=torch.bfloat16))[0].dtype)
    return report
