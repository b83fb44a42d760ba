"""The engine of this environment; each has one of its own, because they pin conflicting versions."""

from importlib import import_module
from importlib.util import find_spec

from qnext_plugin.engines.config import ENGINES
from tests.mutants import Mutant

ENGINE = next((engine for engine in ENGINES if find_spec(engine)), "")
assert ENGINE, f"none of {', '.join(ENGINES)} is installed; run these tests in an environment that scripts/setup makes"

MUTANTS: list[Mutant] = import_module(f"tests.mutants.{ENGINE}").MUTANTS
