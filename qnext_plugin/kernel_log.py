"""A record of the kernels that have served in this process; tests and ``qnext verify`` read it."""

KERNELS_RAN: set[str] = set()
"""Entries look like ``"phase: convolution, delta rule"``; each adapter documents its entries."""


def record(what: str) -> None:
    KERNELS_RAN.add(what)
