"""How ours is put in the place of an engine's functions; tests/engines/test_replacements.py has the adapters' lists."""

import sys
from types import ModuleType

import pytest

from qnext_plugin import replacements
from qnext_plugin.replacements import IN_FORCE, Feature, Replacement, install, resolve


class Runner:
    limit = 1

    def step(self, output, limit):
        return output + limit

    @classmethod
    def named(cls, name):
        return f"{cls.__name__} {name}"

    @staticmethod
    def double(x):
        return 2 * x


@pytest.fixture
def engine(monkeypatch):
    """A module with a class that inherits what is replaced, a mapping, and functions of ours."""
    module = ModuleType("an_engine")
    module.Base = type("Base", (), dict(vars(Runner)))
    module.Runner = type("Runner", (module.Base,), {})
    module.METHODS = {}
    module.step = lambda original, self, output, limit: 10 * original(self, output, limit)
    module.named = lambda original, cls, name: original(cls, name).upper()
    module.double = lambda x: 3 * x
    module.LIMIT = 7
    monkeypatch.setitem(sys.modules, "an_engine", module)
    monkeypatch.setattr(replacements, "IN_FORCE", {})
    return module


def of(target, ours, **more):
    used = more.pop("used", True)
    feature = Feature("steps on CPUs", lambda config: used)
    return Replacement(feature, f"an_engine:{target}", f"an_engine:{ours}", "it waits", "it does not", **more)


def installed(*wanted):
    for _ in range(2):
        install(wanted, None, "Engine", "1.2")


def test_around_replace_and_set(engine):
    installed(
        of("Runner.step", "step", kind="around", parameters=("output", "limit")),
        of("Runner.named", "named", kind="around"),
        of("Runner.double", "double"),
        of("Runner.limit", "LIMIT", kind="set"),
        of("METHODS[gptq]", "double", kind="set"),
    )
    assert engine.Runner().step(1, limit=2) == 30, "once, though installed twice"
    assert engine.Runner.named("x") == "RUNNER X"
    assert engine.Runner.double(2) == engine.Runner().double(2) == 6
    assert engine.Runner.limit == 7
    assert {"gptq": engine.double} == engine.METHODS
    assert engine.Base().step(1, 2) == 3, "what it inherits stays"
    assert replacements.IN_FORCE.keys() == {
        f"an_engine:{name}"
        for name in ("Runner.step", "Runner.named", "Runner.double", "Runner.limit", "METHODS[gptq]")
    }


def test_what_is_not_used_is_not_replaced(engine):
    installed(of("Runner.step", "step", kind="around", used=False))
    assert engine.Runner().step(1, 2) == 3 and not replacements.IN_FORCE


@pytest.mark.parametrize(
    ("target", "parameters", "words"),
    [
        ("Runner.run", (), "an_engine:Runner.run does not exist"),
        ("Gone.step", (), "an_engine:Gone.step does not exist"),
        ("Runner.step", ("output", "most"), "an_engine:Runner.step has no parameter most, only self, output, limit"),
    ],
)
def test_target_that_is_another_is_refused(engine, target, parameters, words):
    with pytest.raises(RuntimeError) as error:
        installed(of(target, "step", kind="around", parameters=parameters))
    for word in (f"Engine 1.2: {words}", "for steps on CPUs, because it waits", "QNEXT_DISABLE=1"):
        assert word in str(error.value)
    assert not replacements.IN_FORCE


def test_nothing_is_in_force_without_an_engine():
    assert not IN_FORCE
    assert resolve("builtins:str.join") is str.join
