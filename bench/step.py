"""How long a forward pass and its logits take in an engine on a CPU; what is left of a step is the engine's.

    echo decode batch 1 | python -m bench.step vllm|sglang MODEL DIRECTORY

The workloads of ``qnext bench``, eager, in bfloat16. Line i of the input is one; ``DIRECTORY/<i>.json`` answers it,
with what ``qnext bench`` finds and two times in milliseconds. ``model ms`` is for a prefill the least of a batch's
passes together, for a decode the median of a pass; ``step ms`` is for a prefill until the first tokens, for a decode
from the beginning of a pass to that of the next.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qnext_plugin.engines import process

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


def measurements(engine_name: str, model: str, workloads: Iterable[str]) -> Iterator[dict[str, Any]]:
    from qnext_plugin.bench import worker
    from qnext_plugin.bench.side import Task
    from qnext_plugin.config import QNextConfig
    from qnext_plugin.engines.config import EngineConfig

    task = Task(model, WORKLOADS)
    config = EngineConfig(dtype=task.dtype, max_model_len=task.longest, flags=tuple(task.flags(engine_name)))
    engine = import_module(f"{engine_name}_ext.tools.engine").Engine(model, config)
    assert all(module.startswith(f"{engine_name}_ext.") for module in engine.serving()["modules"])
    prompts = worker.random_prompts(QNextConfig.from_pretrained(model).vocab_size)
    for name in workloads:
        workload = WORKLOADS[name]
        with engine.broken("bench.step:stopwatch"):
            found = worker.measure(engine.answer, prompts, prompts, {name: workload})[name]
        passes = json.loads(Path(os.environ[OUT]).read_text())
        if "output" in workload:
            yield found | decode(passes, workload["batch"])
        else:
            yield found | prefill(passes, **workload, rate=found["tokens per second"])


@contextmanager
def started(engine: str, model: Path, python: str = sys.executable) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What measures a workload, in a process that starts and ends with this."""
    with tempfile.TemporaryDirectory() as directory:
        log, numbers = Path(directory) / "log", count()
        with process.started(["-m", "bench.step", engine, str(model), directory], log, python=python) as child:

            def measure(workload: str) -> dict[str, Any]:
                assert child.stdin
                child.stdin.write(f"{workload}\n".encode())
                child.stdin.flush()
                out = Path(directory) / f"{next(numbers)}.json"
                process.wait_until(out.exists, child, log, timeout=600)
                return dict(json.loads(out.read_text()))

            yield measure


def main(engine: str, model: str, directory: str) -> None:
    # All cores, as `qnext bench`; before torch is loaded, which looks once.
    cores = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= cores | {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ
    part = Path(directory) / "part"
    os.environ[OUT] = str(Path(directory) / "passes")
    for i, found in enumerate(measurements(engine, model, map(str.strip, sys.stdin))):
        part.write_text(json.dumps(found))
        part.rename(part.with_name(f"{i}.json"))
    os._exit(0)  # shutting an engine down can wait for ever; the caller ends the whole process group


if __name__ == "__main__":
    main(*sys.argv[1:])
