"""Measure the rates that this machine reaches: ``python -m qnext_plugin.bench.ceilings DTYPE OUT.json``."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROUNDS = 8


@dataclass(frozen=True)
class Ceilings:
    """The rates of one device.

    They are the bytes per second of reading, the bytes per second that a copy reads and writes, and the operations
    per second of a GEMM. On a CPU torch chooses the number of threads, and the GEMM is in float32 if that is faster.
    """

    read: float
    copy: float
    gemm: float


def measure(dtype: torch.dtype, device: str) -> Ceilings:
    """Measure a sum over 1 GiB, a copy of it, and a product of two square matrices in ``dtype``.

    Each rate is the best of a few rounds.
    """
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = 8192 if device == "cuda" else 2048
    dtypes = {dtype} if device == "cuda" else {dtype, torch.float32}
    pairs = [torch.randn(2, size, size, device=device).to(each) for each in dtypes]
    return Ceilings(
        read=source.nbytes / _seconds(source.sum, device),
        copy=2 * source.nbytes / _seconds(lambda: target.copy_(source), device),
        gemm=2 * size**3 / min(_seconds(partial(torch.nn.functional.linear, *pair), device) for pair in pairs),
    )


def _seconds(call: Callable[[], Any], device: str) -> float:
    found = []
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


if __name__ == "__main__":
    found = measure(getattr(torch, sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu")
    Path(sys.argv[2]).write_text(json.dumps(asdict(found)))
