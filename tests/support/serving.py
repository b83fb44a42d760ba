"""A small server under pressure: short steps, a cache that runs out, and drafts where the engine has them."""

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qnext_plugin.engines import process

MAX_LEN = 512
MTP = {"method": "qwen3_next_mtp", "num_speculative_tokens": 2}
COMMANDS = {
    "vllm": [
        *("-m", "vllm.entrypoints.cli.main", "serve", "{model}", "--max-model-len", str(MAX_LEN)),
        *("--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "40", "--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "64", "--speculative-config", json.dumps(MTP)),
    ],
    "sglang": [
        *("-m", "sglang.launch_server", "--model-path", "{model}", "--context-length", str(MAX_LEN)),
        *("--max-total-tokens", "1300", "--max-running-requests", "8", "--max-mamba-cache-size", "40"),
        *("--chunked-prefill-size", "64", "--enable-metrics"),
    ],
}
ENVIRONMENT = {
    # SGLang admits to a small cache only what it can finish there, so it is told to take requests back.
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "20",
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
}
METRICS = {
    "vllm": {
        "preempted": "vllm:num_preemptions_total",
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "used": "vllm:kv_cache_usage_perc",
    },
    "sglang": {
        "preempted": "sglang:num_retracted_requests_total",
        "running": "sglang:num_running_reqs",
        "waiting": "sglang:num_queue_reqs",
        "used": "sglang:num_used_tokens",
        "states": "sglang:mamba_used_tokens",
    },
}


@dataclass(frozen=True)
class Answer:
    """``logprobs[i]`` is that of ``token_ids[i]``."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Server:
    engine: str
    url: str
    log: Path
    group: int

    def request(self, prompt: tuple[int, ...], max_tokens: int, temperature: float, **more: Any) -> dict[str, Any]:
        """Keyword arguments of a POST that asks for ``max_tokens`` more ids and their log-probabilities."""
        if self.engine == "vllm":
            body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "logprobs": 0, "return_token_ids": True}
            return {"url": "/v1/completions", "json": body | {"temperature": temperature, "ignore_eos": True} | more}
        sampling = {"max_new_tokens": max_tokens, "temperature": temperature, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return {"url": "/generate", "json": body | more}

    def parse(self, response: httpx.Response) -> Answer:
        assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
        if self.engine == "vllm":
            choice = response.json()["choices"][0]
            return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
        rows = response.json()["meta_info"]["output_token_logprobs"]
        return Answer(tuple(row[1] for row in rows), tuple(row[0] for row in rows))

    def metrics(self) -> dict[str, float]:
        """Sums over labels, by the names in ``METRICS``."""
        lines = [line.rsplit(" ", 1) for line in httpx.get(f"{self.url}/metrics").text.splitlines() if line[:1] != "#"]
        return {
            name: sum(float(value) for key, value in lines if key.partition("{")[0] == metric)
            for name, metric in METRICS[self.engine].items()
        }

    def resident_bytes(self) -> int:
        """Memory of the server and the processes that it started."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.group:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return total


@contextmanager
def crowded(engine: str, model: Path, log: Path) -> Iterator[Server]:
    with serving(engine, COMMANDS[engine], model, log, ENVIRONMENT) as server:
        yield server


@contextmanager
def serving(engine: str, command: Sequence[str], model: Path, log: Path, env: Mapping[str, str]) -> Iterator[Server]:
    """Run ``command``, with the model for ``{model}``, until it answers."""
    port = process.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [word.format(model=model) if word == "{model}" else word for word in command]
    command += ["--dtype", "float32", "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    with process.started(command, log, env) as server:
        process.wait_until(healthy, server, log, timeout=400)
        assert "is served by" in log.read_text(errors="replace"), process.tail(log)
        yield Server(engine, url, log, server.pid)
