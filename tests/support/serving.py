"""A small server under pressure: short steps, a cache that runs out, and drafts where the engine has them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qnext_plugin.engines import server
from qnext_plugin.engines.config import mtp_flags
from qnext_plugin.engines.who_serves import check_log

MAX_LEN = 512
FLAGS = {
    "vllm": [
        *("--max-model-len", str(MAX_LEN), "--enforce-eager", "--block-size", "32"),
        *("--num-gpu-blocks-override", "40", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
        *mtp_flags("vllm", 2),
    ],
    "sglang": [
        *("--context-length", str(MAX_LEN), "--max-total-tokens", "1300", "--max-running-requests", "8"),
        *("--max-mamba-cache-size", "40", "--chunked-prefill-size", "64", "--enable-metrics"),
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


class Server(server.Server):
    """A server whose log-probabilities are asked for."""

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
            if int(fields[2]) == self.process.pid:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return total


@contextmanager
def crowded(engine: str, model: Path, log: Path) -> Iterator[Server]:
    with serving(engine, FLAGS[engine], model, log, ENVIRONMENT) as running:
        yield running


@contextmanager
def serving(engine: str, flags: Sequence[str], model: Path, log: Path, env: Mapping[str, str]) -> Iterator[Server]:
    """Serve a model in float32 under the name ``m``, by our classes."""
    flags = [*flags, "--dtype", "float32", "--served-model-name", "m"]
    with server.serving(engine, str(model), flags, log, env=env) as running:
        check_log(engine, False, log)
        yield Server(running.engine, running.url, log, running.process)
