"""End to end on a GPU: our model and vLLM's own, each in a process that stays, measured in turn:
``python -m bench.gpu_check.serving [--prepare] [--quick] [--out FILE] [--deadline UNIX-TIME]``.

The 80B's dimensions with fewer layers and experts; the checkpoint's draft is the one that ``engines`` explains, for
both sides.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gpu_check import engines
from bench.gpu_check.report import Report
from qnext_plugin.bench.report import summary
from qnext_plugin.bench.side import Side, Task, offline

CHECKPOINT = {
    "serving": {
        "preset": "80b",
        "dtype": "bfloat16",
        "overrides": {"num_hidden_layers": 4, "num_experts": 64},
    }
}
WORKLOADS = {
    "prefill 8x2048": {"batch": 8, "length": 2048},
    "prefill 1x8000": {"batch": 1, "length": 8000},
    "decode batch 1": {"batch": 1, "length": 32, "output": 128},
    "decode batch 8": {"batch": 8, "length": 32, "output": 128},
    "decode batch 64": {"batch": 64, "length": 32, "output": 128},
}
# Four engines share the GPU.
FLAGS = (
    *("--additional-config", '{"gdn_prefill_backend": "triton"}'),
    *("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(5 << 30)),
)
MTP = (2, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write the checkpoint only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--deadline", type=float, default=time.time() + 600)
    args = parser.parse_args()
    report = Report("engines" if args.prepare else "serving", args.out, args.deadline)
    engines.CHECKPOINTS |= CHECKPOINT
    made: dict[str, str] = {}

    def prepare() -> dict[str, Any]:
        made["model"] = str(engines.checkpoint("serving"))
        return {}

    report.run("write the checkpoint" if args.prepare else "checkpoint", prepare)
    if args.prepare or "model" not in made:
        return int(report.failed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # All load at once; while one is measured the others wait.
        sides = {
            mtp: {
                side.name: stack.enter_context(
                    offline(side, Task(made["model"], WORKLOADS, draft_tokens=mtp), folder / f"{side.name}-{mtp}")
                )
                for side in (Side("ours", "vllm", flags=FLAGS), Side("native", "vllm", native=True, flags=FLAGS))
            }
            for mtp in (MTP[:1] if args.quick else MTP)
        }
        pairs: dict[int, list[Any]] = {mtp: [] for mtp in sides}
        rounds = 2 if args.quick else 3
        for i in range(rounds):
            for mtp in sides:

                def pair(mtp: int = mtp) -> dict[str, Any]:
                    pairs[mtp].append({name: measure() for name, measure in sides[mtp].items()})
                    table = summary(pairs[mtp])
                    ratios = {f"{name}, ratio": row["ratio"] for name, row in table.items()}
                    decodes = [row["ratio"] for name, row in table.items() if name.startswith("decode")]
                    target = "met" if min(decodes) >= (1.1 if mtp else 1.0) else "missed"
                    return ratios | {"target": target, "workloads": table}

                report.run(f"MTP {mtp}, pair {i + 1} of {rounds}", pair)
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
