"""What a decode step costs as the context grows, by kind of layer, in vLLM: the state of Gated DeltaNet stays the same.

    python -m bench.context MODEL [--lengths 1024 32768] [--json FILE]

CPU seconds of the layer's thread, so that other load does not count; lengths in turn, medians over all steps. MODEL can
be any checkpoint that takes the longest, such as that of
``qnext checkpoint random DIR --dtype float32 --set max_position_embeddings=33000``.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

STEPS, ROUNDS = 64, 3
KINDS = {"linear_attn": "Gated DeltaNet", "self_attn": "gated attention"}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from qnext_plugin.bench.worker import random_prompts
    from qnext_plugin.config import QNextConfig
    from qnext_plugin.verify.scenarios import EngineConfig
    from qnext_plugin.verify.worker import check_modules
    from vllm_ext.bench import Engine

    longest = max(args.lengths) + STEPS + 1
    engine = Engine(args.model, EngineConfig("", dtype=args.dtype, max_model_len=longest))
    check_modules(engine.serving()["modules"], "vllm_ext.")
    prompts = random_prompts(QNextConfig.from_pretrained(args.model).vocab_size)
    layers = [
        Stopwatch(module, KINDS[name.rpartition(".")[2]])
        for name, module in engine.worker.model_runner.model.named_modules()
        if name.rpartition(".")[2] in KINDS
    ]
    found: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in args.lengths} for kind in KINDS.values()}
    for _ in range(ROUNDS):
        for length in args.lengths:
            engine.answer(prompts(1, length), 1 + STEPS)
            for layer in layers:
                assert len(layer.steps) == STEPS, f"{layer.name}: {len(layer.steps)} steps, expected {STEPS}"
                found[layer.name][length] += layer.steps
                layer.steps.clear()
    table = {kind: {n: 1e6 * statistics.median(times) for n, times in by.items()} for kind, by in found.items()}
    for kind, by in table.items():
        growth = by[max(by)] / by[min(by)]
        steps = ", ".join(f"{n}: {us:.0f} us" for n, us in by.items())
        print(
            f"{kind}, one layer's decode step at a context of {steps}; longest over shortest {growth:.3f}", flush=True
        )
    if args.json:
        from vllm import __version__

        about = {
            "command": f"python -m bench.context --lengths {' '.join(map(str, args.lengths))}",
            "vllm": __version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
        }
        args.json.write_text(json.dumps(about | {"microseconds by context": table}, indent=1) + "\n")
    os._exit(0)


if __name__ == "__main__":
    main()
