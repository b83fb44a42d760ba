"""The work of scripts/coupling, which prepares the environment and says what this does."""

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

from packaging.version import Version

from qnext_plugin.coupling import check
from qnext_plugin.coupling.policy import is_tested

ROOT = Path(__file__).parent.parent
CACHE = os.environ.get("QNEXT_ENVS") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qnext-plugin"
SOURCES = Path(CACHE).expanduser() / "engine-sources"
TESTED = {engine: import_module(f"{engine}_ext.register").TESTED for engine in ("vllm", "sglang")}


def main(arguments: list[str]) -> int:
    failed = False
    for engine, versions in (asked_for(arguments) if arguments else tested_and_newest()).items():
        previous: dict[str, str] = {}
        for version in versions:
            report = check(f"{engine}_ext", engine, ROOT / f"{engine}_ext", fetch(engine, version))
            binding = bool(arguments) or is_tested(version, TESTED[engine])
            failed |= binding and bool(report.problems)
            kind = "tested range" if is_tested(version, TESTED[engine]) else "outside the tested range"
            verdict = f"{len(report.problems)} do not fit" if report.problems else "all are there"
            print(f"{engine} {version} ({kind}): of {len(report.facts)} names in use, {verdict}")
            for line in report.problems:
                print(f"  {line}")
            for line in moved(previous, report.facts):
                print(f"  since the version before: {line}")
            previous = report.facts
    return int(failed)


def asked_for(arguments: list[str]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for argument in arguments:
        engine, separator, version = argument.partition("==")
        if not separator or engine not in TESTED or not re.fullmatch(r"[\w.]+", version):
            sys.exit(f"coupling: {argument!r} found, expected ENGINE==VERSION, such as vllm==0.33.0")
        wanted.setdefault(engine, []).append(version)
    return wanted


def tested_and_newest() -> dict[str, list[str]]:
    """In order, oldest first."""
    wanted = {}
    for engine, tested in TESTED.items():
        versions = sorted(available(engine), key=Version)
        wanted[engine] = [v for v in versions if is_tested(v, tested) or v == versions[-1]]
        if not any(is_tested(v, tested) for v in versions):
            sys.exit(f"coupling: pip finds no {engine}{tested}, and none is in {SOURCES}; is there a network?")
    return wanted


def available(engine: str) -> set[str]:
    """What pip finds, and what an earlier run has kept."""
    pip = subprocess.run([sys.executable, "-m", "pip", "index", "versions", engine], capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.*)$", pip.stdout, re.MULTILINE)
    kept = {directory.name for directory in (SOURCES / engine).glob("*")}
    return kept | set(listed[1].split(", ") if listed else ())


def fetch(engine: str, version: str) -> Path:
    """Directory of the engine's package, as the wheel on PyPI has it, without what is not Python."""
    target = SOURCES / engine / version
    if not target.exists():
        print(f"downloading {engine} {version}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SOURCES) as scratch:
            options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--dest", scratch]
            pip = [sys.executable, "-m", "pip", "download", *options, f"{engine}=={version}"]
            if subprocess.run(pip).returncode:
                sys.exit(f"coupling: pip cannot download {engine}=={version}")
            unpacked = Path(scratch) / "sources"
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.endswith(".py")])
            unpacked.rename(target)
    return target / engine


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What looks different of the names that both versions have, one line each."""
    lines = []
    for name in sorted(before.keys() & after.keys()):
        if before[name] == after[name]:
            continue
        old, new = ((*text[name].partition(" #"),) for text in (before, after))
        gone = [part for part in parts(old[0]) if part not in parts(new[0])]
        added = [part for part in parts(new[0]) if part not in parts(old[0])]
        details = [f"no longer {', '.join(gone)}"] * bool(gone) + [f"now {', '.join(added)}"] * bool(added)
        lines.append(f"{name}: {'; '.join(details) or 'order' if old[0] != new[0] else 'what it does'}")
    return lines


def parts(description: str) -> list[str]:
    """The parameters of a signature, and what it returns."""
    try:
        function = ast.parse(f"def f{description.removeprefix('class')}: ...").body[0]
    except SyntaxError:
        return [description]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    returns = [f"-> {ast.unparse(function.returns)}"] if function.returns else []
    return [ast.unparse(argument) for argument in every] + returns


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
