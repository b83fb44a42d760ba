"""The formats that a default run loads for every rank; those of the other groups only ``--all`` does."""

from collections.abc import Iterable
from typing import Any

import pytest

GROUPS = (
    ("plain", "fp8-block", "fp8-channel", "gptq"),
    ("w8a8", "w4a16", "awq", "nvfp4"),
    ("mxfp8", "mxfp4", "nvfp4-llm-compressor", "gptq-int8", "mxfp4-quark"),
)


def in_groups(names: Iterable[str]) -> list[Any]:
    """``names`` as parameters of a test, marked ``exhaustive`` where they are not of the first group."""
    return [name if name in GROUPS[0] else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def group_of(name: str) -> tuple[str, ...]:
    return next(names for names in GROUPS if name in names)
