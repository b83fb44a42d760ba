"""The work of scripts/types, which prepares the environment and says what this does."""

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path

from packaging.version import Version

from qnext_plugin.engines.versions import is_tested

ROOT = Path(__file__).parent.parent
BASELINE = ROOT / "scripts" / "types-baseline.txt"
CACHE = os.environ.get("QNEXT_ENVS") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qnext-plugin"
SOURCES = Path(CACHE).expanduser() / "engine-sources"
CORE = "qnext_plugin"
TESTED = {engine: import_module(f"{engine}_ext.register").TESTED for engine in ("vllm", "sglang")}
DIAGNOSTIC = re.compile(r"([^:]+):\d+:\d+: \w+\[([\w-]+)\] .*")
OPERATOR = re.compile(r"torch\.ops\.(?:_C|vllm)\.(\w+)")
Kind = tuple[str, str]
"""A file and a rule."""


def main(arguments: list[str]) -> int:
    update = arguments == ["--update"]
    chosen = [] if update else arguments
    allowed = Counter() if update else read_baseline()
    most, failed = Counter[Kind](), False
    for engine, versions in (asked_for(chosen) if chosen else tested_and_newest()).items():
        for version in versions:
            sources = fetch(engine, version)
            found = type_errors(engine, sources) | {(f"{engine}_ext", "name"): forgotten_names(engine, sources)}
            counts = Counter({kind: len(lines) for kind, lines in found.items()})
            new = [line for kind in counts - allowed for line in found[kind]]
            tested = is_tested(version, TESTED[engine])
            if tested:
                most |= counts
            print(f"{engine} {version} ({'tested' if tested else 'not tested'}): {counts.total()} problems")
            if not update:
                failed |= bool(new) and (tested or bool(chosen))
                print("".join(f"  {line}\n" for line in new), end="")
    if update:
        BASELINE.write_text("".join(f"{most[kind]} {' '.join(kind)}\n" for kind in sorted(most) if most[kind]))
    elif not chosen and (fewer := allowed - most):
        print("fewer problems than scripts/types-baseline.txt counts; run scripts/types --update:", *fewer)
        failed = True
    return int(failed)


def read_baseline() -> Counter[Kind]:
    """How many problems are known of each kind; most are where torch or an engine promises less than it keeps."""
    lines = (line.split() for line in BASELINE.read_text().splitlines())
    return Counter({(file, rule): int(count) for count, file, rule in lines})


def type_errors(engine: str, sources: Path) -> dict[Kind, list[str]]:
    """What the type checker says of the core and the engine's adapter, with the engine as it is in ``sources``."""
    options = ["--python", sys.prefix, "--extra-search-path", str(sources), "--output-format", "concise"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["ty", "check", "--no-progress", *options, CORE, f"{engine}_ext"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        if match := DIAGNOSTIC.fullmatch(line):
            found[match[1], match[2]].append(line)
    if done.returncode not in (0, 1) or bool(found) != bool(done.returncode):
        sys.exit(f"types: ty ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return found


def forgotten_names(engine: str, sources: Path) -> list[str]:
    """What is found by its name alone and the engine no longer mentions: our methods that it calls, its operators."""
    files = [file for package in (CORE, f"{engine}_ext") for file in (ROOT / package).rglob("*.py")]
    trees = {file: ast.parse(file.read_bytes()) for file in files}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    wanted = {
        f"{file.relative_to(ROOT)}:{method.lineno}: nothing in {engine} asks for {method.name!r}": method.name
        for file, tree in trees.items()
        if file.is_relative_to(ROOT / f"{engine}_ext")
        for body in ast.walk(tree)
        if isinstance(body, ast.ClassDef)
        for method in body.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("__") and method.name not in used
    }
    for node in nodes:
        if isinstance(node, ast.Attribute) and (operator := OPERATOR.fullmatch(ast.unparse(node))):
            wanted[f"{engine} does not mention {operator[0]}"] = operator[1]
    words = {word for file in sources.rglob("*.py") for word in re.findall(rb"\w+", file.read_bytes())}
    return [line for line, name in wanted.items() if name.encode() not in words]


def asked_for(arguments: list[str]) -> dict[str, list[str]]:
    wanted: dict[str, list[str]] = {}
    for argument in arguments:
        engine, separator, version = argument.partition("==")
        if not separator or engine not in TESTED or not re.fullmatch(r"[\w.]+", version):
            sys.exit(f"types: {argument!r} found, expected ENGINE==VERSION, such as vllm==0.33.0")
        wanted.setdefault(engine, []).append(version)
    return wanted


def tested_and_newest() -> dict[str, list[str]]:
    """In order, oldest first."""
    wanted = {}
    for engine, tested in TESTED.items():
        versions = sorted(available(engine), key=Version)
        wanted[engine] = [v for v in versions if is_tested(v, tested) or v == versions[-1]]
        if not any(is_tested(v, tested) for v in versions):
            sys.exit(f"types: pip finds no {engine}{tested}, and none is in {SOURCES}; is there a network?")
    return wanted


def available(engine: str) -> set[str]:
    """What pip finds, and what an earlier run has kept."""
    pip = subprocess.run([sys.executable, "-m", "pip", "index", "versions", engine], capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.*)$", pip.stdout, re.MULTILINE)
    kept = {directory.name for directory in (SOURCES / engine).glob("*")}
    return kept | set(listed[1].split(", ") if listed else ())


def fetch(engine: str, version: str) -> Path:
    """Directory with the engine's package as the wheel on PyPI has it, without what is not Python."""
    target = SOURCES / engine / version
    if not target.exists():
        print(f"downloading {engine} {version}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SOURCES) as scratch:
            options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--dest", scratch]
            pip = [sys.executable, "-m", "pip", "download", *options, f"{engine}=={version}"]
            if subprocess.run(pip).returncode:
                sys.exit(f"types: pip cannot download {engine}=={version}")
            unpacked = Path(scratch) / "sources"
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.endswith(".py")])
            unpacked.rename(target)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
