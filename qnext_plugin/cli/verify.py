"""``qnext verify`` checks that an engine computes from a checkpoint what it should."""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from qnext_plugin.engines.config import ENGINES


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "verify",
        help="compare the engine's answers with float32 transformers",
        description="Serve a checkpoint with the engine of this environment, in every way that caches, batches and "
        "drafts can go wrong, and compare its log-probabilities with those of float32 transformers on the CPU. With "
        "--batch-invariant, compare each request alone with the same request in a batch instead; with --url, ask a "
        "server that is running. Other arguments are passed to the engine, such as --tensor-parallel-size 4. The exit "
        "status is 0 if everything agrees, 1 if not, and 2 if nothing could be compared.",
        allow_abbrev=False,
        examples=(
            "qnext verify MODEL --engine vllm --quick",
            "qnext verify MODEL --engine sglang --dtype bfloat16 --mtp 2 --full",
        ),
    )
    parser.set_defaults(run=_verify, flags=[])  # arguments that this parser does not know are the engine's
    parser.add_argument("model", metavar="MODEL", help="a local directory, or a name on the hub, which is downloaded")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--engine", choices=ENGINES, help="the engine that serves")
    who.add_argument("--url", help="start no engine; ask this server of vLLM or SGLang, which serves MODEL")
    parser.add_argument(
        "--against",
        metavar="URL",
        help="with --url: compare with this second server instead of transformers; no weights are needed here",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="data type to serve in (default: float32, which proves most), or with --url the server's (default: what "
        "it says); bfloat16 may be as far off as bfloat16 transformers",
    )
    parser.add_argument("--mtp", type=int, default=0, metavar="N", help="verify MTP too, with N draft tokens")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="start the engine once, twice with --mtp (default)")
    extent.add_argument("--full", action="store_true", help="make every start: eager, compiled, chunked, ...")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="verify instead that a request gets the same bits alone and in batches of up to 32, and with its prompt "
        "computed in one piece and in several",
    )
    parser.add_argument("--native", action="store_true", help="verify the engine's own model instead of this plugin's")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="keep the answers of transformers in FILE, so that the next run does not compute them again",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--logs", type=Path, metavar="DIR", help="keep the engine's logs and answers in a new directory"
    )


def _verify(args: argparse.Namespace) -> int:
    if args.against and not args.url:
        raise ValueError("--against needs --url, the server to compare")
    if args.url:
        return _url(args)
    if not find_spec(args.engine):
        raise ValueError(f"{args.engine} is not installed in this environment; run qnext with the engine's own python")
    args.dtype = args.dtype or "float32"
    return _batch_invariant(args) if args.batch_invariant else _offline(args)


def _offline(args: argparse.Namespace) -> int:
    """Start the engine in every way that was asked for, and compare it with `transformers`."""
    from qnext_plugin.verify import starts
    from qnext_plugin.verify.reference import Recorded
    from qnext_plugin.verify.report import OK, Row, notes, table
    from qnext_plugin.verify.verification import judge, serve

    checkpoint = checkpoint_directory(args.model)
    graphs = _prepare_engine(args, cache_gib=1)
    planned = starts.plan(checkpoint, args.engine, **_options(args), graphs=graphs)
    versions = _versions(args.engine)
    recorded = Recorded(checkpoint, args.reference)
    with _directory(args) as directory:
        started, failures = serve(checkpoint, args.engine, planned, directory, args.native, print)
        rows = judge(started, failures, recorded)
    rows += [Row(start, key, "not run: longer than the model takes") for start, key in planned.too_long]
    print(f"{_title(args, versions)}, against transformers {versions['transformers']} in float32\n")
    print(table(rows))
    print(*notes(rows), sep="\n")
    _write(args, "verify", rows, native=args.native, versions=versions)
    return 0 if all(row.verdict == OK for row in rows) else 1


def _batch_invariant(args: argparse.Namespace) -> int:
    """Compare each request's answer alone with its answers among others, bit by bit."""
    from qnext_plugin.verify import invariance
    from qnext_plugin.verify.report import table
    from qnext_plugin.verify.verification import serve

    checkpoint = checkpoint_directory(args.model)
    graphs = _prepare_engine(args, cache_gib=4)
    os.environ.update(invariance.ENVIRONMENT)
    planned = invariance.plan(checkpoint, args.engine, **_options(args), graphs=graphs)
    versions = _versions(args.engine)
    with _directory(args) as directory:
        started, failures = serve(checkpoint, args.engine, planned, directory, args.native, print)
        rows = invariance.judge(started, failures)
    print(f"{_title(args, versions)}, each request among others against the same request alone\n")
    print(table(rows, invariance.COLUMNS))
    _write(args, "batch-invariant", rows, native=args.native, versions=versions)
    return 0 if all(row.verdict == invariance.BITWISE for row in rows) else 1


def _url(args: argparse.Namespace) -> int:
    """Ask a running server, and compare it with `transformers` or with a second server."""
    from qnext_plugin.config import QNextConfig
    from qnext_plugin.verify import served
    from qnext_plugin.verify.dialects import connect
    from qnext_plugin.verify.reference import Recorded
    from qnext_plugin.verify.report import notes, table
    from qnext_plugin.verify.verification import judge

    for_starts = {"--mtp": args.mtp, "--full": args.full, "--quick": args.quick, "--native": args.native}
    for_starts |= {"--batch-invariant": args.batch_invariant, " ".join(args.flags): args.flags}
    if given := [name for name, value in for_starts.items() if value]:
        raise ValueError(f"{', '.join(given)}: only for an engine that verify starts; a server is as it was started")
    checkpoint = checkpoint_directory(args.model, weights=not args.against)
    vocab_size = QNextConfig.from_pretrained(checkpoint).vocab_size
    servers = [connect(url, vocab_size) for url in (args.url, args.against) if url]
    for server in servers:
        served.check_same_model(server, checkpoint)
        print(*served.description(server), sep="\n")
    dtype, source = served.served_dtype(args.dtype, servers[0], checkpoint)
    with _directory(args) as directory:
        start, ruled_out = served.plan(servers, checkpoint, dtype, directory / "server")
        failures = served.ask(servers[0], start, print)
        if args.against:
            rows = served.judge_by_server(start, failures, servers[1], directory / "second", print)
            reference = f"{servers[1].engine} {servers[1].facts.version} at {args.against}"
        else:
            rows = judge([start], failures, Recorded(checkpoint, args.reference))
            reference = f"transformers {version('transformers')} in float32"
    rows += ruled_out
    print(f"\n{args.model} in {dtype} ({source}) at {args.url}, against {reference}\n")
    print(table(rows))
    print(*notes(rows), *served.notes(rows), sep="\n")
    _write(args, "verify-url", rows, dtype=dtype, reference=reference, servers=[vars(s.facts) for s in servers])
    return 0 if served.passed(rows) else 1


def _prepare_engine(args: argparse.Namespace, cache_gib: int) -> bool:
    """Set what an engine on a CPU needs in its environment; returns whether compiled starts differ from eager ones."""
    import torch

    if not (on_gpu := torch.cuda.is_available()):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    return on_gpu or args.engine == "vllm"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": args.dtype, "draft_tokens": args.mtp, "full": args.full, "flags": args.flags}


def _versions(engine: str) -> dict[str, str]:
    return {name: version(packages_distributions()[name][0]) for name in (engine, "transformers", "torch")}


def _title(args: argparse.Namespace, versions: dict[str, str]) -> str:
    by = f"{args.engine} {versions[args.engine]}" + (", its own model" if args.native else "")
    return f"\n{args.model} in {args.dtype} on {by}"


@contextmanager
def _directory(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the directory for logs and answers, which is temporary unless the user named one."""
    with tempfile.TemporaryDirectory() as scratch:
        yield args.logs or Path(scratch)


class _AsJson(Protocol):
    def as_json(self) -> dict[str, object]: ...


def _write(args: argparse.Namespace, kind: str, rows: Sequence[_AsJson], **more: Any) -> None:
    """Write the report to the file that the user named, if any."""
    if args.json:
        report = {"kind": kind, "model": args.model, "dtype": args.dtype, **more}
        report["rows"] = [row.as_json() for row in rows]
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def checkpoint_directory(model: str, weights: bool = True) -> Path:
    """Return the directory of a local checkpoint or of one on the hub, which is downloaded, with ``weights`` or not."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    from qnext_plugin.checkpoint.stored import check_name

    check_name(model)
    patterns = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
    return Path(snapshot_download(model, allow_patterns=patterns))
