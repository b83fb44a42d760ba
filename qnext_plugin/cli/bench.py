"""``qnext bench`` compares the speed of a served model with the engine's own model and the machine's limits."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qnext_plugin.cli.verify import checkpoint_directory
from qnext_plugin.engines.config import ENGINES


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure tokens per second beside the engine's own model",
        description="Measure tokens per second of prefill and of decode with this plugin and with the engine's own "
        "model in turn, each time in a new process. A number is the better of two measurements after a warm-up. Other "
        "arguments are passed to the engine, such as --enforce-eager. The exit status is 1 if an engine failed.",
        allow_abbrev=False,
        examples=(
            "qnext bench MODEL --engine vllm --mtp 2 --batch 1 8 --json speed.json --plot speed.svg",
            "qnext bench MODEL --engine sglang --against none --serve",
        ),
    )
    parser.set_defaults(run=_bench, flags=[])  # arguments that this parser does not know are the engine's
    parser.add_argument("model", metavar="MODEL", help="a local directory, or a name on the hub, which is downloaded")
    parser.add_argument("--engine", required=True, choices=ENGINES, help="the engine that serves")
    parser.add_argument(
        "--against",
        default="native",
        choices=("native", "none", *ENGINES),
        help="what to compare with: the engine's own model (default), nothing, or this plugin on the engine named",
    )
    parser.add_argument(
        "--against-python",
        default=sys.executable,
        metavar="PYTHON",
        help="the interpreter that has --against's engine (default: this one)",
    )
    parser.add_argument(
        "--against-flags",
        type=shlex.split,
        metavar="FLAGS",
        help="the other side's engine arguments, quoted as one word (default: the same)",
    )
    parser.add_argument("--serve", action="store_true", help="measure over HTTP, with the engine's own bench client")
    parser.add_argument(
        "--pairs", type=_positive, default=2, metavar="N", help="number of turns of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="data type to serve in (default: %(default)s)",
    )
    parser.add_argument("--mtp", type=int, default=0, metavar="N", help="draft tokens in each step (default: 0)")
    parser.add_argument(
        "--prefill",
        type=_prompts,
        nargs="*",
        default=[(4, 512), (1, 2000)],
        metavar="BxLEN",
        help="number of prompts that arrive at once, x, tokens of each (default: 4x512 1x2000)",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        nargs="*",
        default=[1, 4, 8],
        metavar="N",
        help="number of sequences decoded at once, or of requests with --serve (default: 1 4 8)",
    )
    parser.add_argument(
        "--input-len", type=_positive, default=32, metavar="N", help="prompt tokens before a decode (default: 32)"
    )
    parser.add_argument(
        "--output-len", type=_positive, default=32, metavar="N", help="tokens that a decode makes (default: 32)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="decode from the prompts in FILE (one per line)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a chart as .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the engines' logs in a new directory")


def _bench(args: argparse.Namespace) -> int:
    from qnext_plugin.bench import report
    from qnext_plugin.bench.limits import add_limits
    from qnext_plugin.bench.side import Task, read_once

    if args.plot:
        report.check_plot(args.plot)
    sides = chosen_sides(args)
    directory = checkpoint_directory(args.model)
    prompts = read_prompts(directory, args.prompts) if args.prompts else []
    task = Task(str(directory), workloads(args, prompts), args.dtype, args.mtp, prompts)
    check_lengths(directory, task)
    with _logs(args.logs) as logs:
        ceilings = measured_ceilings(args.dtype, logs)
        read_once(directory)
        pairs = [dict(_measured(args, sides, task, logs / f"{i + 1}", i + 1)) for i in range(args.pairs)]
    found = make_report(args, sides, pairs, ceilings)
    report.add_acceptance(found.workloads, found.mtp)
    if not args.serve and found.ranks == 1:
        add_limits(found.workloads, {side.name: side.engine for side in sides}, ceilings, directory, task)
    print(f"\n{report.text(found)}")
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    if args.plot:
        report.plot(found, args.plot)
    return 0


def chosen_sides(args: argparse.Namespace) -> list[Any]:
    """Return our side and the side that it is compared with; raises ``ValueError`` for a side that cannot run here."""
    import torch

    from qnext_plugin.bench.side import Side

    if not find_spec(args.engine):
        raise ValueError(f"{args.engine} is not installed in this environment; run qnext with the engine's own python")
    if not 0 <= args.mtp < 8:
        raise ValueError(f"--mtp is {args.mtp}, expected 0 to 7")
    ours = Side("ours", args.engine, flags=tuple(args.flags))
    if args.against == "none":
        return [ours]
    flags = tuple(args.flags if args.against_flags is None else args.against_flags)
    if args.against in ENGINES:
        if args.against_flags is None and args.against != args.engine:
            flags = ()  # the engines have different flags
        if args.against_python == sys.executable and not find_spec(args.against):
            raise ValueError(
                f"{args.against} is not installed in this environment; give --against-python the one it is in"
            )
        return [ours, Side(args.against, args.against, python=args.against_python, flags=flags)]
    if not torch.accelerator.is_available():
        if args.engine == "sglang":
            raise ValueError("SGLang's own model does not run without an accelerator; measure ours with --against none")
        if args.dtype != "bfloat16":
            raise ValueError(
                f"vLLM's own model runs in bfloat16 only on a CPU, not in {args.dtype}; see --against none"
            )
    return [ours, Side("native", args.engine, native=True, flags=flags)]


def workloads(args: argparse.Namespace, prompts: Sequence[Sequence[int]] = ()) -> dict[str, dict[str, int]]:
    """Return the workloads for ``bench.worker.measure``. Decodes start from ``prompts``, or from random tokens."""
    length = max(map(len, prompts), default=args.input_len)
    if args.serve:
        if prompts:
            raise ValueError("--prompts is for the engine alone; the bench clients of --serve send random tokens")
        return {f"serve {n}": {"batch": n, "length": length, "output": args.output_len} for n in args.batch}
    found = {f"prefill {batch}x{tokens}": {"batch": batch, "length": tokens} for batch, tokens in args.prefill}
    decode = {"length": length, "output": args.output_len}
    found |= {f"decode batch {n}": {"batch": n, **decode} for n in args.batch}
    if not found:
        raise ValueError("nothing to measure: both --prefill and --batch are empty")
    return found


def check_lengths(directory: Path, task: Any) -> None:
    from qnext_plugin.config import QNextConfig

    longest = QNextConfig.from_pretrained(directory).max_position_embeddings
    if task.longest > longest:
        raise ValueError(
            f"sequences of {task.longest} tokens, and the model takes {longest}; choose smaller --prefill, --input-len "
            "or --output-len"
        )


def read_prompts(directory: Path, file: Path) -> list[list[int]]:
    """Return the token ids of each line, which is a user's question in the chat template, if there is a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file}: no prompts, expected one a line")
    if not tokenizer.chat_template:
        return [tokenizer(line)["input_ids"] for line in lines]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": line}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for line in lines
    ]


def measured_ceilings(dtype: str, logs: Path) -> dict[str, float]:
    """Measure the machine's rates in a separate process, with as many threads as the engines get."""
    from qnext_plugin.engines import process

    out, log = logs / "ceilings.json", logs / "ceilings.log"
    status = process.run(["-m", "qnext_plugin.bench.ceilings", dtype, str(out)], log)
    if status:
        raise OSError(f"measuring memory and GEMM rates failed:\n{process.tail(log)}")
    return dict(json.loads(out.read_text()))


def _measured(
    args: argparse.Namespace, sides: Sequence[Any], task: Any, directory: Path, pair: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    from qnext_plugin.bench.report import RATE
    from qnext_plugin.bench.served import behind_http
    from qnext_plugin.bench.side import offline
    from qnext_plugin.engines.process import EngineFailed

    for side in sides:
        try:
            with (behind_http if args.serve else offline)(side, task, directory / side.name) as measure:
                found = measure()
        except EngineFailed as e:
            raise EngineFailed(f"{side.name}: {e.reason}", e.log) from None
        rates = ", ".join(f"{name} {one[RATE]:.1f}" for name, one in found["workloads"].items())
        print(
            f"pair {pair} of {args.pairs}: {side.name} ({', '.join(found['modules']) or 'native'}): {rates}", flush=True
        )
        yield side.name, found


def make_report(
    args: argparse.Namespace, sides: Sequence[Any], pairs: Sequence[Mapping[str, Any]], ceilings: dict[str, float]
) -> Any:
    """Return a ``bench.report.Report``; it keeps only the names of absolute paths in the command."""
    import torch

    from qnext_plugin.bench.report import ABOUT, Report, summary

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return Report(
        kind="served" if args.serve else "offline",
        command=shlex.join(["qnext", *words]),
        model=Path(args.model).name,
        machine=gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        date=time.strftime("%Y-%m-%d"),
        sides=[side.name for side in sides],
        engines={side.name: f"{side.engine} {side.version}" for side in sides},
        modules={side.name: pairs[0][side.name]["modules"] for side in sides},
        ranks=pairs[0]["ours"].get("ranks"),
        dtype=args.dtype,
        mtp=args.mtp,
        ceilings=ceilings,
        about={
            key: {side.name: [pair[side.name][key] for pair in pairs] for side in sides}
            for key, *_ in ABOUT
            if all(key in measured for pair in pairs for measured in pair.values())
        },
        workloads=summary(pairs),
    )


@contextmanager
def _logs(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _prompts(text: str) -> tuple[int, int]:
    batch, x, length = text.partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS, such as 4x512")
    return _positive(batch), _positive(length)
