"""Where the time of a decode step goes in vLLM on a CPU: the model, or the engine around it.

    echo decode batch 1 | python -m bench.step MODEL

The workloads of ``qnext bench``, eager, in bfloat16, with a stopwatch around the model's forward pass and its logits. A
step is from the beginning of one forward pass to that of the next. Each line of the input is a workload; a line of JSON
answers it.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

WORKLOADS = {
    "prefill 1x2000": {"batch": 1, "length": 2000},
    "prefill 4x512": {"batch": 4, "length": 512},
    "decode batch 1": {"batch": 1, "length": 32, "output": 32},
    "decode batch 4": {"batch": 4, "length": 32, "output": 32},
    "decode batch 8": {"batch": 8, "length": 32, "output": 32},
}


class Stopwatch:
    """Of a model; ``steps`` are the tokens of each forward pass, when it began, and its and its logits' seconds."""

    def __init__(self, model: Any) -> None:
        self.steps: list[tuple[int, float, float]] = []
        forward, compute_logits = model.forward, model.compute_logits

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            hidden_states = forward(*args, **kwargs)
            self.steps.append((len(hidden_states), begin, time.perf_counter() - begin))
            return hidden_states

        def timed_logits(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            logits = compute_logits(*args, **kwargs)
            tokens, begun, seconds = self.steps[-1]
            self.steps[-1] = tokens, begun, seconds + time.perf_counter() - begin
            return logits

        model.forward, model.compute_logits = timed_forward, timed_logits

    def decode(self, batch: int) -> dict[str, float]:
        """Medians in milliseconds, of the steps of ``batch`` tokens that another one follows."""
        pairs = [(a, b) for a, b in zip(self.steps, self.steps[1:], strict=False) if a[0] == b[0] == batch]
        assert pairs, f"no two steps of {batch} tokens after one another"
        return {
            "model ms": 1e3 * statistics.median(seconds for (_, _, seconds), _ in pairs),
            "step ms": 1e3 * statistics.median(after - begun for (_, begun, _), (_, after, _) in pairs),
        }


def measurements(model: str, workloads: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Of each workload what ``qnext bench`` finds, and of decodes the milliseconds of a step."""
    from qnext_plugin.bench import worker
    from qnext_plugin.bench.side import Task
    from qnext_plugin.config import QNextConfig
    from qnext_plugin.verify.scenarios import EngineConfig
    from vllm_ext.bench import Engine

    task = Task(model, WORKLOADS)
    config = EngineConfig("", dtype=task.dtype, max_model_len=task.longest, flags=tuple(task.flags("vllm")))
    engine = Engine(model, config)
    worker.check_modules(engine.serving()["modules"], "vllm_ext.")
    watch = Stopwatch(engine.worker.model_runner.model)
    prompts = worker.random_prompts(QNextConfig.from_pretrained(model).vocab_size)
    for name in workloads:
        workload = WORKLOADS[name]
        watch.steps.clear()
        found = worker.measure(engine.answer, prompts, prompts, {name: workload})[name]
        yield found | (watch.decode(workload["batch"]) if "output" in workload else {})


if __name__ == "__main__":
    # All cores, as `qnext bench`; before torch is loaded, which looks once.
    cores = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= cores | {"VLLM_CPU_KVCACHE_SPACE": "2"} | os.environ
    for measured in measurements(sys.argv[1], map(str.strip, sys.stdin)):
        print(json.dumps(measured), flush=True)
    os._exit(0)  # shutting an engine down can wait for ever
