"""Measure a side over HTTP: the engine's own server, under load from the engine's own bench client."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qnext_plugin.bench.side import TIMEOUT, Measure, Side, Task, device_bytes, peak_memory
from qnext_plugin.engines import process, server
from qnext_plugin.engines.process import EngineFailed, failure
from qnext_plugin.engines.who_serves import check_log

ROUNDS = 4  # requests of each simulated client

# Prompts are random tokens, because the clients would have to download their other data sets.
CLIENTS = {
    "vllm": (
        *("-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai", "--dataset-name", "random"),
        *("--ignore-eos", "--temperature", "0", "--num-warmups", "{batch}", "--save-result"),
        *("--result-filename", "{out}"),
    ),
    "sglang": (
        *("-m", "sglang.bench_serving", "--backend", "sglang", "--dataset-name", "random-ids", "--tokenize-prompt"),
        *("--random-range-ratio", "1", "--warmup-requests", "{batch}", "--output-file", "{out}"),
    ),
}
BOTH = (
    *("--base-url", "{url}", "--model", "{model}", "--random-input-len", "{length}", "--random-output-len", "{output}"),
    *("--num-prompts", "{requests}", "--max-concurrency", "{batch}", "--disable-tqdm"),
)
FIGURES = {
    "output_throughput": "tokens per second",
    "median_ttft_ms": "first token ms",
    "median_tpot_ms": "further token ms",
    "spec_decode_acceptance_length": "tokens per step",
    "accept_length": "tokens per step",
}


@contextmanager
def behind_http(side: Side, task: Task, directory: Path) -> Iterator[Measure]:
    """Start a side's server, and yield a function that measures it, as ``side.offline`` does.

    A workload's ``batch`` is the number of requests that are answered at a time.
    """
    directory.mkdir(parents=True)
    log, before, begun = directory / "log", device_bytes(), time.monotonic()
    flags = [*task.flags(side.engine), *side.flags]
    started = server.serving(
        side.engine, task.model, flags, log, env=side.environment, python=side.python, timeout=TIMEOUT
    )
    with started as running:
        modules = sorted(check_log(side.engine, side.native, log).values())
        about: dict[str, Any] = {"modules": modules, "start-up seconds": time.monotonic() - begun}

        def measure() -> dict[str, Any]:
            begin = time.monotonic()
            complete(running.url, task.model)
            first = {"first request seconds": time.monotonic() - begin}
            found = {name: load(**workload) for name, workload in task.workloads.items()}
            return about | first | {"workloads": found} | peak_memory(running.process.pid, before)

        def load(batch: int, length: int, output: int) -> dict[str, Any]:
            out, client_log = directory / "client.json", directory / "client.log"
            out.unlink(missing_ok=True)
            values: dict[str, Any] = {"model": task.model, "url": running.url, "out": out, "requests": ROUNDS * batch}
            sizes = {"batch": batch, "length": length, "output": output}
            words = [word.format(**values, **sizes) for word in (*CLIENTS[side.engine], *BOTH)]
            status = process.run(words, client_log, side.environment, TIMEOUT, side.python)
            if status or not out.exists():
                raise EngineFailed(f"the bench client: {failure(client_log, status)}", client_log)
            result = json.loads(out.read_text().splitlines()[-1])
            if result["completed"] != ROUNDS * batch:
                raise EngineFailed(f"{result['completed']} of {ROUNDS * batch} requests answered", log)
            return {name: result[key] for key, name in FIGURES.items() if result.get(key) is not None}

        yield measure


def complete(url: str, model: str) -> None:
    """Request one token. A failure is ignored, because the load that follows fails too."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with suppress(OSError), urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()
