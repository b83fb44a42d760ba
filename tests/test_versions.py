"""Which versions of an engine are served, and what is done about others."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from qnext_plugin.engines.versions import is_tested, judge

ROOT = Path(__file__).parent.parent
ENGINES = ("vllm", "sglang")


def declared(engine: str) -> str:
    return str(import_module(f"{engine}_ext.register").TESTED)


@pytest.mark.parametrize("engine", ENGINES)
def test_extra_of_the_package_is_the_tested_range(engine):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[engine] == [f"{engine}{declared(engine)}"]


@pytest.mark.parametrize("engine", ENGINES)
def test_pinned_versions_are_tested_ones(engine):
    for device in ("cpu", "cuda"):
        for line in (ROOT / "scripts" / f"requirements-{engine}-{device}.txt").read_text().split():
            name, _, version = line.partition("==")
            assert name not in (engine, f"{engine}-cpu") or version in SpecifierSet(declared(engine))


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("0.32.0", True),
        ("0.33.1+cpu", True),
        ("0.33.1.dev5+g1234", True),
        ("0.31.2", False),
        ("0.34.0rc1", False),
        ("0.34.0", False),
        ("dev", False),
    ],
)
def test_versions_in_the_range(version, inside):
    assert is_tested(version, ">=0.32,<0.34") == inside


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A module that serves, not imported yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "serving_model", raising=False)
    (tmp_path / "serving_model.py").touch()
    judge.cache_clear()
    return tmp_path / "serving_model.py"


def test_nothing_is_imported_within_the_range(serving):
    verdict = judge("engine", "1.1", "<2", ("serving_model",))
    assert verdict.serves and not verdict.message
    assert "serving_model" not in sys.modules


def test_version_outside_of_it_is_served_with_a_warning(serving):
    verdict = judge("engine", "2.0", "<2", ("serving_model",))
    assert verdict.serves and "serving_model" in sys.modules
    assert all(word in verdict.message for word in ("<2", "2.0", "answers may be wrong", "QNEXT_DISABLE=1"))


def test_version_that_lacks_something_is_refused(serving):
    serving.write_text("from packaging import gone\n")
    verdict = judge("engine", "2.0", "<2", ("serving_model",))
    assert not verdict.serves
    assert "serving_model cannot be imported (ImportError: cannot import name 'gone'" in verdict.message
    assert "engine's own model serves" in verdict.message
