"""The coupling check finds what an engine no longer has, and nothing where it has everything."""

import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from qnext_plugin.coupling import check, check_installed
from qnext_plugin.coupling.policy import is_tested, judge

ROOT = Path(__file__).parent.parent
ENGINES = ("vllm", "sglang")

ENGINE = {
    "__init__.py": "LAZY = {'Registry': '.layers:Registry'}\ndef __getattr__(name): ...\n",
    "layers.py": """
import torch
from dataclasses import dataclass
from abc import ABC, abstractmethod
from torch import nn
class Linear(nn.Module):
    def __init__(self, size, bias=True, *, prefix=""): ...
    def scatter(self, x): ...
class Base(ABC):
    @abstractmethod
    def state(self): ...
    def apply(self, x, scale=1): ...
class Registry:
    def register(self, name, target): ...
@dataclass
class Metadata:
    lengths: torch.Tensor
    slots: torch.Tensor | None = None
@dataclass
class Config:
    metadata: Metadata
class Drafts(Metadata):
    num_drafts: int = 0
def run(model, metadata: Metadata) -> Metadata:
    model.size_of()
    return metadata
""",
    "ops.py": "from engine.layers import run as run_op\nNAMES = ['attention_core']\n",
    "worker.py": """
class Runner:
    def __init__(self, size): self.batch_size = size
    def step(self, output, limit): ...
""",
}
ADAPTER = {
    "__init__.py": "",
    "model.py": """
import torch
from engine import Registry
from engine.layers import Base, Config, Linear, Metadata, run
from engine import ops
class Model(Base):
    def __init__(self, config: Config):
        self.linear = Linear(4, prefix="linear")
        self.metadata = config.metadata
    def state(self): return torch.ops.engine.attention_core(self.metadata.lengths)
    def apply(self, x, scale=1): return self.linear.scatter(x)
    def size_of(self): return run(self, self.metadata).slots, self.metadata.num_drafts
    def copy(self): return ops.run_op(self, Metadata(1, slots=2))
Registry().register("Model", Model)
model = Model(None)
model.copy()
""",
    "compat.py": """
def patch():
    from engine.worker import Runner
    def step(original, self, *args):
        return self.batch_size
    replace(Runner, "step", step, ("output", "limit"))
TARGET = "engine.worker." + "Runner"
def optional(layer):
    try:
        from engine.layers import Gone
    except ImportError:
        pass
    return getattr(layer, "gone", None)
""",
}


@pytest.fixture
def packages(tmp_path):
    for name, files in (("engine", ENGINE), ("adapter", ADAPTER)):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    return tmp_path


def problems(packages: Path) -> list[str]:
    return check("adapter", "engine", packages / "adapter", packages / "engine").problems


def test_nothing_where_everything_is_there(packages):
    report = check("adapter", "engine", packages / "adapter", packages / "engine")
    assert report.problems == []
    assert report.facts["engine.layers.run"] == "(model, metadata: Metadata) -> Metadata"
    assert {"engine.layers.Metadata.slots", "engine.worker.Runner.batch_size"} < report.facts.keys()


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("layers.py", "def run(", "def go(", "model.py:4: engine.layers.run does not exist"),
        ("ops.py", "run as run_op", "run", "model.py:13: engine.ops.run_op does not exist"),
        ("__init__.py", "'Registry'", "'Other'", "model.py:3: engine.Registry does not exist"),
        ("layers.py", "slots: torch", "blocks: torch", "model.py:12: engine.layers.Metadata.slots does not exist"),
        ("layers.py", "num_drafts:", "drafts:", "model.py:12: engine.layers.Metadata.num_drafts does not exist"),
        ("layers.py", "metadata: Metadata\n", "meta: Metadata\n", "engine.layers.Config.metadata does not exist"),
        ("layers.py", 'prefix=""', 'name=""', "model.py:8: engine.layers.Linear: takes no argument 'prefix'"),
        ("layers.py", "bias=True", "bias", "engine.layers.Linear: needs an argument 'bias', which we do not give"),
        ("layers.py", "(model, metadata", "(metadata", "engine.layers.run: takes 1 positional arguments, we give 2"),
        ("layers.py", "def scatter(", "def spread(", "model.py:11: engine.layers.Linear.scatter does not exist"),
        ("layers.py", "scale=1)", "scale=1, *, bias=0)", "engine.layers.Base.apply: is called with bias, which"),
        ("layers.py", "scale=1)", "scale, bias)", "engine.layers.Base.apply: is called with bias, which"),
        ("layers.py", "def state", "def states", "engine.layers.Base demands 'states'"),
        ("layers.py", "model.size_of()", "model.bytes_of()", "Model: nothing in engine asks for 'size_of' any more"),
        ("ops.py", "attention_core", "attention", "torch.ops.engine.attention_core: engine does not mention it"),
        ("worker.py", "limit)", "most)", "compat.py:6: engine.worker.Runner.step has no parameter 'limit'"),
        ("worker.py", "def step", "def run", "compat.py:6: engine.worker.Runner.step does not exist"),
        ("worker.py", "self.batch_size", "self.size", "compat.py:5: engine.worker.Runner.batch_size does not exist"),
        ("worker.py", "class Runner", "class Executor", "compat.py:7: engine.worker.Runner does not exist"),
    ],
)
def test_what_is_gone_is_named(packages, file, old, new, problem):
    target = packages / "engine" / file
    assert old in target.read_text()
    target.write_text(target.read_text().replace(old, new))
    found = problems(packages)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if find_spec(engine)])
def test_installed_engine_has_all_that_its_adapter_uses(engine):
    report = check_installed(f"{engine}_ext", engine)
    assert report.problems == []
    assert len(report.facts) > 100


@pytest.mark.parametrize("engine", ENGINES)
def test_extra_of_the_package_is_the_tested_range(engine):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[engine] == [f"{engine}{declared(engine)}"]


def declared(engine: str) -> str:
    return str(import_module(f"{engine}_ext.register").TESTED)


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


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if find_spec(engine)])
def test_newer_engine_that_has_everything_is_served_with_a_warning(engine):
    verdict = judge(f"{engine}_ext", engine, "99.1", declared(engine))
    assert verdict.serves
    assert "99.1" in verdict.message and declared(engine) in verdict.message and "QNEXT_DISABLE=1" in verdict.message


def test_tested_engine_is_not_examined():
    verdict = judge("no_such_adapter", "no_such_engine", "0.33.0", ">=0.32,<0.34")
    assert verdict.serves and not verdict.message


def test_newer_engine_that_lacks_something_is_refused(packages, monkeypatch):
    monkeypatch.syspath_prepend(packages)
    (packages / "engine" / "worker.py").write_text("")
    verdict = judge("adapter", "engine", "2.0", "<2")
    assert not verdict.serves
    assert "engine's own model serves" in verdict.message
    assert any("engine.worker.Runner does not exist" in problem for problem in verdict.problems)
