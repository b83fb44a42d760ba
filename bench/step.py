"""How long a forward pass and its logits take in an engine on a CPU; what is left of a step is the engine's.

The workloads of ``qnext bench``, eager, in bfloat16; each gives what ``qnext bench`` finds and two times in
milliseconds. ``model ms`` is for a prefill the least of a batch's passes together, for a decode the median of a pass;
``step ms`` is for a prefill until the first tokens, for a decode from the beginning of a pass to that of the next.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qnext_plugin.bench.side import TIMEOUT, Side, Task
from qnext_plugin.bench.worker import measure_engine
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import RemoteEngine, started_engine

WORKLOADS = {
    "prefill 1x2000": {"batch": 1, "length": 2000},
    "prefill 4x512": {"batch": 4, "length": 512},
    "decode batch 1": {"batch": 1, "length": 32, "output": 32},
    "decode batch 4": {"batch": 4, "length": 32, "output": 32},
    "decode batch 8": {"batch": 8, "length": 32, "output": 32},
}
OUT = "QNEXT_BENCH_PASSES"
Pass = tuple[int, float, float]
"""Tokens of a forward pass, when it began, and its and its logits' seconds."""


@contextmanager
def stopwatch(worker: Any) -> Iterator[None]:
    """Around the model of an engine's ``worker``, in its process; writes each ``Pass`` to file ``OUT`` at the end."""
    model = worker.model_runner.model
    passes: list[Pass] = []
    forward, compute_logits = model.forward, getattr(model, "compute_logits", None)

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = forward(*args, **kwargs)
        input_ids = args[0] if args else kwargs["input_ids"]
        passes.append((len(input_ids), begin, time.perf_counter() - begin))
        return result

    def timed_logits(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        logits = compute_logits(*args, **kwargs)
        tokens, begun, seconds = passes[-1]
        passes[-1] = tokens, begun, seconds + time.perf_counter() - begin
        return logits

    with ExitStack() as patches:
        patches.enter_context(patch.object(model, "forward", timed_forward))
        if compute_logits:  # which SGLang's models call in their forward pass
            patches.enter_context(patch.object(model, "compute_logits", timed_logits))
        yield
    Path(os.environ[OUT]).write_text(json.dumps(passes))


def prefill(passes: Iterable[Pass], batch: int, length: int, rate: float) -> dict[str, float]:
    sums, tokens, seconds = [], 0, 0.0
    for more_tokens, _, more_seconds in passes:
        tokens, seconds = tokens + more_tokens, seconds + more_seconds
        if tokens == batch * length:
            sums.append(seconds)
            tokens, seconds = 0, 0.0
    assert sums and not tokens, f"passes over {tokens} tokens more than batches of {batch * length}"
    return {"model ms": 1e3 * min(sums), "step ms": 1e3 * batch * length / rate}


def decode(passes: list[Pass], batch: int) -> dict[str, float]:
    pairs = [(a, b) for a, b in pairwise(passes) if a[0] == b[0] == batch]
    assert pairs, f"no two passes over {batch} tokens after one another"
    return {
        "model ms": 1e3 * statistics.median(seconds for (_, _, seconds), _ in pairs),
        "step ms": 1e3 * statistics.median(after - begun for (_, begun, _), (_, after, _) in pairs),
    }


def measure(engine: Any, model: str, name: str) -> dict[str, Any]:
    """Measure the workload ``name`` of ``WORKLOADS``, in the process that holds an adapter's ``engine``."""
    workload = WORKLOADS[name]
    with engine.broken("bench.step:stopwatch"):
        found = measure_engine(engine, model, {name: workload}, [])[name]
    passes = json.loads(Path(os.environ[OUT]).read_text())
    if "output" in workload:
        return found | decode(passes, workload["batch"])
    return found | prefill(passes, **workload, rate=found["tokens per second"])


@contextmanager
def started(engine: str, model: Path, python: str = sys.executable) -> Iterator[RemoteEngine]:
    """Start ours on ``engine``, for ``measured``."""
    task, side = Task(str(model), WORKLOADS), Side("ours", engine, python=python)
    config = EngineConfig(dtype=task.dtype, max_model_len=task.longest, flags=tuple(task.flags(engine)))
    with tempfile.TemporaryDirectory() as scratch:
        env = side.environment | {OUT: f"{scratch}/passes"}
        directory = Path(scratch) / "engine"
        with started_engine(engine, task.model, config, directory, env=env, python=python) as remote:
            remote.ready(TIMEOUT)
            remote.serving(TIMEOUT)
            yield remote


def measured(remote: RemoteEngine, model: Path, name: str) -> dict[str, Any]:
    """Call ``measure`` in a ``started`` engine."""
    found: dict[str, Any] = remote.call("bench.step:measure", TIMEOUT, model=str(model), name=name)
    return found
