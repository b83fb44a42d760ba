"""One-line breakages of a served model, and the scenario that must notice each.

They are applied inside a live engine, so that all of them cost one start. A scenario that notices none of its breakages
proves nothing, so each has one. ``layers`` breaks our own layers, which are the same on both engines.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """``applied(worker)`` is a context manager inside which the served model is broken; ``harmless`` ones only seem so:
    the scenario must not notice."""

    applied: Callable[[Any], AbstractContextManager[Any]]
    scenario: str
    config: str = "prefix"
    harmless: bool = False

    @property
    def name(self) -> str:
        return f"{self.applied.__name__}, {self.scenario}"

    @property
    def path(self) -> str:
        """How another process finds ``applied``."""
        return f"{self.applied.__module__}:{self.applied.__name__}"
