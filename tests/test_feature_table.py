"""docs/features.md says what its data say, and what these name is there."""

import ast
import runpy
from collections import Counter
from pathlib import Path

import pytest

from tests.support.features import FEATURES
from tests.support.matrix import MATRIX, configs

ROOT = Path(__file__).parent.parent
ENGINES = ("vllm", "sglang")
CELLS = [pytest.param(row, engine, id=f"{row.name}, {engine}") for row in FEATURES for engine in ENGINES]


@pytest.fixture(scope="module")
def names():
    """The tests, each as ``file.function``, with its file."""
    found = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{file.stem}.{node.name}"] = file
    return found


def test_the_page_says_what_the_data_say():
    script = runpy.run_path(str(ROOT / "scripts" / "feature_table.py"))
    written = script["DOCUMENT"].read_text().split(script["BEGIN"])[1].split(script["END"])[0]
    assert written == script["tables"](), "run scripts/feature_table.py"


@pytest.mark.parametrize(("row", "engine"), CELLS)
def test_a_cell_names_what_is_there(names, row, engine):
    cell = row.cell(engine)
    assert (bool(cell.tests), bool(cell.message)) == (cell.verdict == "tested", cell.verdict == "refused")
    assert cell.verdict != "expected" or cell.why
    for test in cell.tests:
        other = {"vllm": "test_sglang_", "sglang": "test_vllm_"}[engine]
        assert test in names and other not in test
    for start in cell.starts:
        assert start in configs(engine), f"{start} is no start of {engine} in {sorted(MATRIX)}"
    if cell.source.startswith(("vllm_ext/", "sglang_ext/")):
        assert cell.message in (ROOT / cell.source).read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flag_is_in_one_row(engine):
    twice = [flag for flag, n in Counter(flag for row in FEATURES for flag in row.flags(engine)).items() if n > 1]
    assert not twice
