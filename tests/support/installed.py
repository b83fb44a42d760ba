"""The engine of this environment; each has one of its own, because they pin conflicting versions."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from qnext_plugin.engines.config import ENGINES
from tests.mutants import Mutant

ENGINE = next((engine for engine in ENGINES if find_spec(engine)), "")
assert ENGINE, f"none of {', '.join(ENGINES)} is installed; run these tests in an environment that scripts/setup makes"

MUTANTS: list[Mutant] = import_module(f"tests.mutants.{ENGINE}").MUTANTS


def with_platform(directory: Path, group: str, source: str) -> dict[str, str]:
    """Environment of a process in which a distribution names ``source``'s class ``Other`` as the engine's platform."""
    info = directory / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nother = other:activate\n")
    (directory / "other.py").write_text(f"{source}def activate(): return 'other.Other'\n")
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}
