"""End to end on a GPU: our model and vLLM's own, each in a process that stays, measured in turn:
``python -m bench.gpu_check.serving [--prepare] [--quick] [--out FILE] [--deadline UNIX-TIME]``.

The 80B's dimensions with fewer layers and experts; the checkpoint's draft is the one that ``engines`` explains, for
both sides.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from bench import native
from bench.gpu_check import engines
from bench.gpu_check.report import Report

CHECKPOINT = {
    "serving": {
        "preset": "80b",
        "dtype": "bfloat16",
        "overrides": {"num_hidden_layers": 4, "num_experts": 64},
    }
}
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

    # All load at once; while one is measured the others wait for input.
    sides: dict[int, list[native.Side]] = {}
    for mtp in MTP[:1] if args.quick else MTP:
        options = native.parse([made["model"], "--mtp", str(mtp), "--prefill-backend", "triton"])
        sides[mtp] = [native.Side(options, is_native) for is_native in (False, True)]
    pairs: dict[int, list[Any]] = {mtp: [] for mtp in sides}
    rounds = 2 if args.quick else 3
    try:
        for i in range(rounds):
            for mtp, (ours, theirs) in sides.items():

                def pair(mtp: int = mtp, ours: native.Side = ours, theirs: native.Side = theirs) -> dict[str, Any]:
                    pairs[mtp].append((ours.measure(), theirs.measure()))
                    table = native.summary(pairs[mtp])
                    ratios = {f"{name}, ratio": row["ratio"] for name, row in table.items()}
                    decodes = [row["ratio"] for name, row in table.items() if name.startswith("decode")]
                    target = "met" if min(decodes) >= (1.1 if mtp else 1.0) else "missed"
                    return ratios | {"target": target, "workloads": table}

                report.run(f"MTP {mtp}, pair {i + 1} of {rounds}", pair)
    finally:
        for side in [side for both in sides.values() for side in both]:
            side.process.kill()
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
