"""``qnext doctor`` reports which class would serve, with which kernels, and what prevents it."""

import argparse
import json
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
TIMEOUT = 600  # seconds; an engine's imports alone take half a minute on a small machine


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="report which classes and kernels would serve, or why not",
        usage="%(prog)s [-h] [MODEL] [--engine {vllm,sglang}] [--json] [FLAGS OF THE ENGINE]",
        description="Ask the engine, in a separate process, which classes and kernels would serve a model and what "
        "would stop it. Other arguments are passed to the engine, such as --tensor-parallel-size 4. The exit status is "
        "1 if this plugin would not serve.",
        examples=("qnext doctor", "qnext doctor MODEL --engine vllm --json"),
    )
    doctor.set_defaults(run=_run, flags=[])
    doctor.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a local directory, or a name on the hub (default: a model like the 80B)",
    )
    doctor.add_argument("--engine", choices=tuple(ENGINES), help="the engine to ask (default: every one installed)")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")


def _run(args: argparse.Namespace) -> int:
    engines = [engine for engine in ENGINES if find_spec(engine) and args.engine in (None, engine)]
    if not engines:
        wanted = args.engine or " or ".join(ENGINES)
        raise ValueError(f"{wanted} is not installed in this environment; install it, or activate the one that has it")
    reports = [examine(engine, args.model, args.flags) for engine in engines]
    print(json.dumps(reports, indent=2) if args.json else "\n\n".join(map(_text, reports)))
    return 0 if all(report["serves"] for report in reports) else 1


def examine(engine: str, model: str | None, flags: list[str]) -> dict[str, Any]:
    """Return the report of the adapter's probe, and ``serves``: whether our class would serve without an error."""
    from qnext_plugin.engines import process, remote

    with tempfile.TemporaryDirectory() as scratch:
        target = model or str(_example(Path(scratch)))
        try:
            with remote.started(Path(scratch) / "probe") as probe:
                name = f"{engine}_ext.tools.doctor:report"
                report: dict[str, Any] = probe.call(name, TIMEOUT, model=target, flags=flags)
        except process.EngineFailed as e:
            error = f"the probe failed: {e.reason}; the end of its log:\n{process.tail(e.log, 5)}"
            return {"engine": engine, "serves": False, "errors": [error]}
        if report["errors"] and "SystemExit" in report["errors"][-1]:  # the log has the reason
            report["errors"][-1] += f"\n{process.tail(probe.log, 3)}"
    roles = ["target", "draft"] if "verify" in report["kernels"] else ["target"]
    ours = all(report["classes"].get(role, "").startswith(f"{engine}_ext.") for role in roles)
    return report | {"serves": ours and not report["errors"]}


def _example(scratch: Path) -> Path:
    from qnext_plugin.checkpoint.make_random import PRESETS

    (scratch / "80b").mkdir()
    (scratch / "80b" / "config.json").write_text(json.dumps(PRESETS["80b"] | {"dtype": "bfloat16"}))
    return scratch / "80b"


def _text(report: Mapping[str, Any]) -> str:
    lines = [f"{ENGINES[report['engine']]} {report.get('version', '')}: {_verdict(report)}"]
    if "tested_range" in report:
        lines.append(
            f"  tested range  {report['tested_range']}{'' if report['in_tested_range'] else ': outside of it'}"
        )
    lines += [f"  {role:<12}  {name}" for role, name in report.get("classes", {}).items()]
    lines += [
        f"  {phase:<12}  {kernel}{f' ({reason})' if reason else ''}"
        for phase, (kernel, reason) in report.get("kernels", {}).items()
    ]
    lines += [f"  {'replaced':<12}  {target}: {why}" for target, why in report.get("replacements", [])]
    lines += [f"  error: {error}" for error in report["errors"]]
    lines += [f"  note: {what}. {way_out}" for what, way_out in report.get("risks", [])]
    return "\n".join(lines)


def _verdict(report: Mapping[str, Any]) -> str:
    if report["serves"]:
        return "qnext-plugin serves"
    if report.get("switched_off_by"):
        return f"the engine's own model serves: {' and '.join(report['switched_off_by'])} turned qnext-plugin off"
    target = report.get("classes", {}).get("target", "")
    if target and not target.startswith(f"{report['engine']}_ext."):
        return "the engine's own model serves"
    return "qnext-plugin does not serve"
