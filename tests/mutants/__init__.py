"""One-line breakages of a served model, each of which a named scenario must notice.

They are applied inside a live engine, so that all of them cost one start. A breakage that no scenario notices means
that the scenario's bound proves nothing. ``layers`` breaks our own layers, which are the same on both engines.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """``applied(worker)`` is a context manager inside which the served model is broken."""

    applied: Callable[[Any], AbstractContextManager[Any]]
    scenario: str
    config: str = "prefix"

    @property
    def path(self) -> str:
        """How another process finds ``applied``."""
        return f"{self.applied.__module__}:{self.applied.__name__}"
