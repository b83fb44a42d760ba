"""The layers of the tests: tests stand on what supports them, never on one another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What each folder may import; folders of tests also their own helpers.
BELOW = {
    "support": {"support", "mutants"},
    "mutants": {"mutants"},
    "workers": {"workers", "support"},
}
_WITHOUT_GPU = ("test_gpu_check.py", "test_gpu_dry_run.py", "test_ops_packages.py", "engines/test_vllm_gpu_check.py")
GPU_CHECK = {file: {"gpu"} for file in (*_WITHOUT_GPU, *(f"engines/test_{e}_dry_run.py" for e in ("vllm", "sglang")))}
"""``scripts/gpu-check`` and what runs of it without a GPU stand on what the tests for GPUs write down."""
FILES = sorted(file.relative_to(TESTS) for file in TESTS.rglob("*.py"))


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """The modules under ``tests`` that a file imports, anywhere in it, as their parts below ``tests``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a module is from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *parts = name.split(".")
            if top == "tests":
                yield tuple(parts)


def wrong(file: Path, source: str) -> list[str]:
    below = BELOW.get(file.parts[0], {*BELOW, file.parts[0], *GPU_CHECK.get(str(file), ())})
    return [
        ".".join(parts)
        for parts in imported(source)
        if parts[0] not in below or any(part == "conftest" or part.startswith("test_") for part in parts)
    ]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_test_imports_another_or_a_conftest(file):
    assert not wrong(file, (TESTS / file).read_text())


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engines/test_a.py", "from tests.engines.conftest import whole"),
        ("engines/test_a.py", "def f():\n    from tests.engines import test_b"),
        ("test_a.py", "import tests.test_b"),
        ("support/a.py", "from tests.workers.vllm_several import layers"),
        ("workers/a.py", "from tests.engines.http import server"),
    ],
)
def test_what_breaks_the_rule_is_found(file, source):
    assert wrong(Path(file), source)
