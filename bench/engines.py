"""Ours on SGLang beside ours on vLLM, on a CPU: the time of the model, and of whole steps.

    python -m bench.engines MODEL --python sglang=PYTHON --python vllm=PYTHON [--pairs 2] [--json FILE]

In either environment. Each pair is one process of each engine, with the workloads of ``bench.step`` in turn.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from bench.step import WORKLOADS, measured, started
from qnext_plugin.bench.side import Side, read_once

ENGINES = ("sglang", "vllm")
TIMES = ("model ms", "step ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", action="append", required=True, metavar="ENGINE=PYTHON")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in args.python)
    if set(pythons) != set(ENGINES):
        parser.error(f"--python names {', '.join(pythons)}, expected {' and '.join(ENGINES)}")
    times: dict[str, Any] = {name: {e: {t: [] for t in TIMES} for e in ENGINES} for name in WORKLOADS}
    read_once(args.model)
    for _ in range(args.pairs):
        for engine in ENGINES:
            with started(engine, args.model, pythons[engine]) as remote:
                for name in WORKLOADS:
                    found = measured(remote, args.model, name)
                    print(engine, name, json.dumps(found), flush=True)
                    for each in TIMES:
                        times[name][engine][each].append(found[each])
    result = {
        "kind": "engines",
        "command": f"python -m bench.engines {args.model.name} --pairs {args.pairs}",
        "model": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "engines": {engine: Side(engine, engine, python=python).version for engine, python in pythons.items()},
        "dtype": "bfloat16",
        "times": times,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
