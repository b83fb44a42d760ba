"""The common part of the adapters' ``doctor`` modules. It runs in the engine's environment and never fails."""

import os
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qnext_plugin.checkpoint.stored import read_served
from qnext_plugin.engines.versions import is_tested
from qnext_plugin.replacements import IN_FORCE


def make_report(
    adapter: str,
    engine: str,
    hooks: Sequence[str],
    switches: Sequence[str],
    serving_classes: Callable[[], dict[str, str]],
    examine: Callable[[str, list[str]], dict[str, Any]],
    model: str,
    flags: list[str],
) -> dict[str, Any]:
    """Return the report of ``qnext doctor`` on a model and flags.

    ``hooks`` are the entry point groups that name the adapter. ``switches`` are environment variables that list the
    plugins to keep. ``serving_classes`` asks the engine which classes serve; ``examine`` asks it for the rest and is
    called only if our class serves. If one of them raises, the report lists the error.
    """
    register = import_module(f"{adapter}.register")
    version, tested = str(import_module(f"{engine}.version").__version__), register.TESTED
    verdict = register.verdict()
    report: dict[str, Any] = {
        "engine": engine,
        "version": version,
        "tested_range": tested,
        "in_tested_range": is_tested(version, tested),
        "switched_off_by": _switched_off_by(switches),
        "classes": {},
        "kernels": {},
        "replacements": [],
        "errors": [],
        "risks": [],
    }
    if verdict.message and verdict.serves:
        report["risks"].append((verdict.message, f"pip install '{engine}{tested}'"))
    elif verdict.message:
        report["errors"].append(verdict.message)
    for group in hooks:
        if not any(e.value.startswith(f"{adapter}.") for e in entry_points(group=group)):
            report["errors"].append(f"no entry point {group!r} leads to {adapter}: install qnext-plugin again")
    try:
        if verdict.serves:
            import_module(f"{adapter}.model")
        report["classes"] = serving_classes()
        asked = examine(model, flags) if report["classes"]["target"].startswith(f"{adapter}.") else report
    except (Exception, SystemExit) as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        error = f"{type(e).__name__}: {e} ({where.filename}:{where.lineno})"
        report["errors"].append(_why_not_ours(model) or error)
    else:
        report["kernels"] = asked["kernels"]
        report["replacements"] = [(replacement.target, replacement.why) for replacement in IN_FORCE.values()]
        report |= {name: report[name] + asked[name] for name in ("errors", "risks") if asked is not report}
    return report


def _why_not_ours(model: str) -> str | None:
    """Return why we would refuse a model that the engine has refused before us, in words that lead nowhere."""
    try:
        read_served(model, None, "auto", None)
    except ValueError as e:
        return str(e)
    return None


def _switched_off_by(switches: Sequence[str]) -> list[str]:
    disabled = ["QNEXT_DISABLE"] if os.environ.get("QNEXT_DISABLE", "0") not in ("", "0") else []
    return disabled + [s for s in switches if s in os.environ and "qnext" not in os.environ[s].split(",")]
