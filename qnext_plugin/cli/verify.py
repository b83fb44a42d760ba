"""``qnext verify`` checks that an engine computes from a checkpoint what it should."""

import argparse
import json
import os
import tempfile
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import ENGINES


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a served checkpoint with float32 transformers",
        description="Serve a checkpoint with the engine of this environment, in every way that caches, batches and "
        "drafts can go wrong, and compare its log-probabilities with float32 transformers on the CPU; or, with "
        "--batch-invariant, those of a request alone with those of the same request among others. Further "
        "arguments are the engine's own, such as --tensor-parallel-size 4. Exit status 0: everything agrees; 1: "
        "something does not.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_verify, flags=[])  # arguments that this parser does not know are the engine's
    parser.add_argument("model", metavar="MODEL", help="a local directory or a hub name")
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="to serve in (default: float32, which proves most); bfloat16 may be off as transformers in it is",
    )
    parser.add_argument("--mtp", type=int, default=0, metavar="N", help="also with N drafts of the model's own MTP")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one start, two with --mtp (default)")
    extent.add_argument("--full", action="store_true", help="every start: eager, compiled, chunked, starved, ...")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="ask instead whether a request gets the same bits alone and in batches of up to 32, and whether its "
        "prompt is computed in one piece or several",
    )
    parser.add_argument("--native", action="store_true", help="verify the engine's own model instead of this plugin's")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="keep the reference in FILE: what it holds is not computed again, what it lacks is added",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and more to FILE")
    parser.add_argument(
        "--logs", type=Path, metavar="DIR", help="keep the engine's logs and answers in a new directory"
    )


def _verify(args: argparse.Namespace) -> int:
    import torch

    from qnext_plugin.verify import invariance, starts
    from qnext_plugin.verify.reference import Recorded
    from qnext_plugin.verify.report import OK, Row, notes, table
    from qnext_plugin.verify.verification import judge, serve

    if not find_spec(args.engine):
        raise ValueError(f"{args.engine} is not installed in this environment; run qnext with the engine's own python")
    checkpoint = checkpoint_directory(args.model)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4" if args.batch_invariant else "1")
    if args.batch_invariant:
        os.environ.update(invariance.ENVIRONMENT)
    planned = (invariance if args.batch_invariant else starts).plan(
        checkpoint,
        args.engine,
        dtype=args.dtype,
        draft_tokens=args.mtp,
        full=args.full,
        graphs=on_gpu or args.engine == "vllm",
        flags=args.flags,
    )
    versions = {name: version(packages_distributions()[name][0]) for name in (args.engine, "transformers", "torch")}
    by = f"{args.engine} {versions[args.engine]}" + (", its own model" if args.native else "")
    title = f"\n{args.model} in {args.dtype} on {by}"
    recorded = Recorded(checkpoint, args.reference)
    with tempfile.TemporaryDirectory() as scratch:
        started, failures = serve(checkpoint, args.engine, planned, args.logs or Path(scratch), args.native, print)
        if args.batch_invariant:
            bits = invariance.judge(started, failures)
            print(f"{title}, each request among others against the same request alone\n")
            print(table(bits, invariance.COLUMNS))
            found, passed = [row.as_json() for row in bits], all(row.verdict == invariance.BITWISE for row in bits)
        else:
            rows = judge(started, failures, recorded)
            rows += [Row(start, key, "not run: longer than the model takes") for start, key in planned.too_long]
            print(f"{title}, against transformers {versions['transformers']} in float32\n")
            print(table(rows))
            print(*notes(rows), sep="\n")
            found, passed = [row.as_json() for row in rows], all(row.verdict == OK for row in rows)
    if args.json:
        report = {
            "kind": "batch-invariant" if args.batch_invariant else "verify",
            "model": args.model,
            "dtype": args.dtype,
            "native": args.native,
            "versions": versions,
        }
        args.json.write_text(json.dumps(report | {"rows": found}, indent=1) + "\n")
    return 0 if passed else 1


def checkpoint_directory(model: str) -> Path:
    """Return the directory of a local checkpoint or of one on the hub, which is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
