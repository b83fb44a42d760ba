"""The engine of this environment; each has one of its own, because they pin conflicting versions."""

from importlib.util import find_spec

from tests.engines.scenarios import ENGINES

ENGINE = next((engine for engine in ENGINES if find_spec(engine)), "")
assert ENGINE, f"none of {', '.join(ENGINES)} is installed; run these tests in an environment that scripts/setup makes"
