"""What pyproject.toml declares is what the packages import, and names that are given as strings exist."""

import ast
import re
import sys
import tomllib

import pytest

from tests.support.imports import PACKAGES, ROOT, imported, modules, reachable, statements

ENGINES = {"vllm_ext": "vllm", "sglang_ext": "sglang"}
COMMANDS = ("plot", "quantize")
"""Extras that only a command needs."""
OTHER_NAMES = {"flash-linear-attention": "fla"}
"""Distributions whose module has another name."""
WITH_ENGINE = {"vllm_ext": {"flashinfer"}}
"""Modules that only the engine's build for GPUs needs and brings."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU_PROJECT = tomllib.loads((ROOT / "sglang_cpu" / "pyproject.toml").read_text())["project"]
OUR_NAME = re.compile(rf"({'|'.join(PACKAGES)})[.:][\w.:]*\w")


def declared(*extras: str) -> set[str]:
    """Modules of the distributions that are required, or with ``extras`` that those name."""
    optional = PROJECT["optional-dependencies"]
    requirements = [r for extra in extras for r in optional[extra]] if extras else PROJECT["dependencies"]
    names = (re.split(r"[<>=~!\[; ]", requirement)[0] for requirement in requirements)
    return {OTHER_NAMES.get(name, name).replace("-", "_") for name in names}


def others(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {*PACKAGES, *sys.stdlib_module_names}


def imports_of(package: str) -> set[str]:
    return others({n for module in modules() if module.split(".")[0] == package for n in imported(module, lazy=True)})


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_declared(package: str) -> None:
    extras = (ENGINES[package],) if package in ENGINES else COMMANDS
    assert imports_of(package) <= declared() | declared(*extras) | WITH_ENGINE.get(package, set())


def test_what_is_declared_is_imported() -> None:
    assert declared() <= {name for package in PACKAGES for name in imports_of(package)}
    assert declared(*COMMANDS) <= imports_of("qnext_plugin")
    files = [statements(ast.parse(file.read_text()), lazy=True) for file in (ROOT / "tests" / "gpu").rglob("*.py")]
    benchmarks = {s.module for file in files for s in file if isinstance(s, ast.ImportFrom) and s.module}
    assert declared("baselines") <= others(benchmarks)


def test_no_server_needs_what_only_a_command_does() -> None:
    adapters = [module for module in modules() if module.split(".")[0] in ENGINES]
    assert not others(reachable(adapters)) & declared(*COMMANDS)


def names_in_strings() -> set[str]:
    """Modules, classes and functions of ours that an engine, another process or a reader is given by name."""
    from sglang_ext.register import CPU_PLATFORM
    from vllm_ext.register import ARCHITECTURES

    constants = {n.value for tree in modules().values() for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    found = {c for c in constants if isinstance(c, str) and OUR_NAME.fullmatch(c)}
    for project in (PROJECT, CPU_PROJECT):
        groups = [project.get("scripts", {}), *project["entry-points"].values()]
        found |= {target for group in groups for target in group.values()}
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        found |= {match[0] for match in OUR_NAME.finditer(file.read_text())}
    return found | {CPU_PLATFORM, *ARCHITECTURES.values()}


@pytest.mark.parametrize("name", sorted(names_in_strings()))
def test_name_in_a_string_exists(name: str) -> None:
    dotted = name.replace(":", ".")
    if dotted in modules():
        return
    module, _, attribute = dotted.rpartition(".")
    assert module in modules(), f"{name}: there is no module {module}"
    nodes = list(ast.walk(modules()[module]))
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.alias)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    offered_lazily = {node.value for node in nodes if isinstance(node, ast.Constant)}  # as in vllm_ext/__init__.py
    assert attribute in defined | offered_lazily, f"{module} has no {attribute}"
