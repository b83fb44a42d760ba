"""A side behind HTTP: the engine's own server, under load from the engine's own bench client."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qnext_plugin.bench.side import TIMEOUT, Measure, Side, Task, device_bytes, peak_memory
from qnext_plugin.engines import process
from qnext_plugin.verify.runner import EngineFailed, failure

ROUNDS = 4  # requests of each client that the load imitates

SERVERS = {
    "vllm": ("-m", "vllm.entrypoints.cli.main", "serve", "{model}"),
    "sglang": ("-m", "sglang.launch_server", "--model-path", "{model}"),
}
# Prompts of random tokens, because the clients' other data sets are downloads.
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
    """As ``side.offline``; a workload's ``batch`` is how many requests are answered at a time."""
    directory.mkdir(parents=True)
    log, before, port, begun = directory / "log", device_bytes(), process.free_port(), time.monotonic()
    values: dict[str, Any] = {"model": task.model, "url": f"http://127.0.0.1:{port}"}
    command = [word.format(**values) for word in SERVERS[side.engine]]
    command += [*task.flags(side.engine), "--host", "127.0.0.1", "--port", str(port), *side.flags]
    with process.started(command, log, side.environment, side.python) as server:

        def measure() -> dict[str, Any]:
            try:
                process.wait_until(lambda: answers(f"{values['url']}/health"), server, log, TIMEOUT)
            except AssertionError:
                raise EngineFailed(f"{side.name}: {failure(log, server.poll() or 0)}", log) from None
            started = time.monotonic() - begun
            found = {"modules": serving_modules(side, log), "start-up seconds": started}
            body = {"model": task.model, "prompt": "a", "max_tokens": 1}
            begin = time.monotonic()
            answers(f"{values['url']}/v1/completions", json.dumps(body).encode())
            found["first request seconds"] = time.monotonic() - begin
            found["workloads"] = {name: load(**workload) for name, workload in task.workloads.items()}
            return found | peak_memory(server, before)

        def load(batch: int, length: int, output: int) -> dict[str, Any]:
            out, client_log = directory / "client.json", directory / "client.log"
            out.unlink(missing_ok=True)
            sizes = {"batch": batch, "length": length, "output": output, "requests": ROUNDS * batch, "out": out}
            words = [word.format(**values, **sizes) for word in (*CLIENTS[side.engine], *BOTH)]
            status = process.run(words, client_log, side.environment, TIMEOUT, side.python)
            if status or not out.exists():
                raise EngineFailed(f"{side.name}'s client: {failure(client_log, status)}", client_log)
            result = json.loads(out.read_text().splitlines()[-1])
            if result["completed"] != ROUNDS * batch:
                raise EngineFailed(f"{side.name}: {result['completed']} of {ROUNDS * batch} requests answered", log)
            return {name: result[key] for key, name in FIGURES.items() if result.get(key) is not None}

        yield measure


def serving_modules(side: Side, log: Path) -> list[str]:
    """Of our classes, which the log names when they are registered; none where the engine's own serve."""
    lines = log.read_text(errors="replace").splitlines()
    ours = sorted({line.rpartition(" ")[2] for line in lines if "is served by" in line})
    if bool(ours) == side.native or not all(module.startswith(side.module) for module in ours):
        raise EngineFailed(f"{side.name}: {ours or 'none of our classes'} serve", log)
    return ours


def answers(url: str, body: bytes | None = None) -> bool:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    try:
        with urllib.request.urlopen(request, timeout=600 if body else 5) as answer:
            answer.read()
            return bool(answer.status == 200)
    except OSError:
        return False
