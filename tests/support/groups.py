"""The formats that a default run loads for every rank; those of the second group only ``--all`` does."""

from collections.abc import Iterable
from typing import Any

import pytest

GROUPS = (("plain", "fp8-block", "fp8-channel", "gptq"), ("w8a8", "w4a16", "awq", "nvfp4"))


def in_groups(names: Iterable[str]) -> list[Any]:
    """``names`` as parameters of a test, marked ``exhaustive`` where they are of the second group."""
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in GROUPS[1] else name for name in names]


def group_of(name: str) -> tuple[str, ...]:
    return next(names for names in GROUPS if name in names)
