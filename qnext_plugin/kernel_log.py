"""Which kernels have served in this process; tests and ``qnext verify`` read it."""

KERNELS_RAN: set[str] = set()
"""Such as ``"phase: convolution, delta rule"``; each adapter says what it records."""


def record(what: str) -> None:
    KERNELS_RAN.add(what)
