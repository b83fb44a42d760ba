"""A record of the kernels that have served in this process; tests and ``qnext verify`` read it."""

KERNELS_RAN: set[str] = set()
"""vLLM's entries look like ``"phase: convolution, delta rule"``, ``"experts: name"`` or ``"draft head: int8"``; the CPU
kernels on SGLang record one word each, as ``"extend"`` (prefill) or ``"decode"``."""


def record(what: str) -> None:
    KERNELS_RAN.add(what)
