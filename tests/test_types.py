"""scripts/types finds what an engine no longer has, and nothing where it has everything."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import check_types  # noqa: E402

ENGINE = """
class Base:
    def apply(self, x: int, scale: int = 1) -> int: ...
def run(x: int, scale: int = 1) -> int: ...
def serve(model) -> None: model.size_of()
OPERATORS = ["attention_core"]
"""
ADAPTER = """
import torch
from vllm.layers import Base, run
class Model(Base):
    def apply(self, x: int, scale: int = 1) -> int:
        return run(x, scale=scale)
    def size_of(self) -> int:
        return torch.ops.vllm.attention_core()
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setattr(check_types, "ROOT", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("qnext_plugin", "vllm_ext", "sources/vllm"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "vllm_ext" / "model.py").write_text(ADAPTER)
    (tmp_path / "sources" / "vllm" / "layers.py").write_text(ENGINE)
    return tmp_path / "sources"


def problems(sources: Path) -> list[str]:
    errors = check_types.type_errors("vllm", sources).values()
    return [line for lines in errors for line in lines] + check_types.forgotten_names("vllm", sources)


def test_nothing_where_everything_is_there(sources):
    assert problems(sources) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def run(", "def go(", "has no member `run`"),
        ("def run(x: int, scale", "def run(x: int, factor", "[unknown-argument]"),
        ("apply(self, x", "apply(self, y: int, x", "[incompatible-method-override]"),
        ("model.size_of", "model.bytes_of", "nothing in vllm asks for 'size_of'"),
        ("attention_core", "attention", "vllm does not mention torch.ops.vllm.attention_core"),
    ],
)
def test_what_is_gone_is_named(sources, old, new, problem):
    assert old in ENGINE
    (sources / "vllm" / "layers.py").write_text(ENGINE.replace(old, new))
    assert any(problem in line for line in problems(sources)), problems(sources)
