"""What a decode step costs as the context grows, by kind of layer, in vLLM: the state of Gated DeltaNet stays the same.

    python -m bench.context MODEL [--lengths 1024 32768] [--json FILE]

CPU seconds of the layer's thread, so that other load does not count; medians over a round's steps, lengths in turn in
each round. The experts beside the layers, which know nothing of the context, tell how fast the machine was just then:
growth is in their time. MODEL can be any checkpoint that takes the longest, such as that of
``qnext checkpoint random DIR --dtype float32 --set max_position_embeddings=33000``.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.tables import growth
from qnext_plugin.bench.side import TIMEOUT
from qnext_plugin.bench.worker import random_prompts
from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import started_engine

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

STEPS, ROUNDS = 64, 8
KINDS = {"linear_attn": "Gated DeltaNet", "self_attn": "gated attention", "mlp": "experts"}


class Stopwatch:
    """Around a layer's forward pass; keeps the seconds of passes over one token."""

    def __init__(self, layer: Any, name: str) -> None:
        self.steps: list[float] = []
        layer.register_forward_pre_hook(self.begin)
        layer.register_forward_hook(self.end)
        self.name = name

    def begin(self, layer: Any, args: Any) -> None:
        self.begun = time.thread_time()

    def end(self, layer: Any, args: Any, out: Any) -> None:
        seconds = time.thread_time() - self.begun
        if len(out) == 1:
            self.steps.append(seconds)


def measure(engine: Any, model: str, lengths: list[int]) -> dict[str, dict[str, list[float]]]:
    """Microseconds of a decode step by kind of layer and by length of the context, one for each round."""
    prompts = random_prompts(QNextConfig.from_pretrained(model).vocab_size)
    layers = [
        Stopwatch(module, KINDS[name.rpartition(".")[2]])
        for name, module in engine.worker.model_runner.model.named_modules()
        if name.rpartition(".")[2] in KINDS
    ]
    found: dict[str, dict[str, list[float]]] = {kind: {str(n): [] for n in lengths} for kind in KINDS.values()}
    for _ in range(ROUNDS):
        for length in lengths:
            engine.answer(prompts(1, length), 1 + STEPS)
            for layer in layers:
                if len(layer.steps) != STEPS:
                    raise RuntimeError(f"{layer.name}: {len(layer.steps)} steps found, expected {STEPS}")
            for kind, by in found.items():
                of_kind = [seconds for layer in layers if layer.name == kind for seconds in layer.steps]
                by[str(length)].append(1e6 * statistics.median(of_kind))
            for layer in layers:
                layer.steps.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    config = EngineConfig(dtype=args.dtype, max_model_len=max(args.lengths) + STEPS + 1)
    with (
        tempfile.TemporaryDirectory() as scratch,
        started_engine("vllm", args.model, config, Path(scratch) / "engine") as engine,
    ):
        engine.ready(TIMEOUT)
        engine.serving(TIMEOUT)
        found = engine.call("bench.context:measure", TIMEOUT, model=args.model, lengths=args.lengths)
    for kind, by in found.items():
        steps = ", ".join(f"{n}: {statistics.median(rounds):.0f} us" for n, rounds in by.items())
        print(f"{kind}, one layer's decode step at a context of {steps}; growth {growth(found, kind):.2f}", flush=True)
    if args.json:
        from vllm import __version__

        about = {
            "kind": "context",
            "command": f"python -m bench.context --lengths {' '.join(map(str, args.lengths))}",
            "vllm": __version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
        }
        args.json.write_text(json.dumps(about | {"microseconds by context": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
