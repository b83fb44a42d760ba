"""Servers as users start them, asked over HTTP."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from openai import OpenAI

from qnext_plugin.engines import server
from qnext_plugin.engines.config import ENGINES, mtp_flags
from qnext_plugin.engines.who_serves import check_log

NAME = "m"
MAX_LEN = 512
EXACT = ("--dtype", "float32")
MTP = {engine: tuple(mtp_flags(engine, 2)) for engine in ENGINES}


@dataclass(frozen=True)
class Settings:
    """What a server serves, and each engine's flags."""

    checkpoint: str
    flags: Mapping[str, Sequence[str]]
    env: Mapping[str, str] = field(default_factory=dict)


SERVERS = {
    # Under pressure: short steps, a cache that runs out, and drafts on vLLM.
    "crowded": Settings(
        "tiny",
        {
            "vllm": (
                *("--max-model-len", str(MAX_LEN), "--enforce-eager", "--block-size", "32"),
                *("--num-gpu-blocks-override", "40", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
                *(*MTP["vllm"], *EXACT),
            ),
            "sglang": (
                *("--context-length", str(MAX_LEN), "--max-total-tokens", "1300", "--max-running-requests", "8"),
                *("--max-mamba-cache-size", "40", "--chunked-prefill-size", "64", "--enable-metrics"),
                *("--sleep-on-idle", *EXACT),
            ),
        },
        {
            # SGLang admits to a small cache only what it can finish there, so it is told to take requests back.
            "SGLANG_TEST_RETRACT": "1",
            "SGLANG_TEST_RETRACT_INTERVAL": "20",
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        },
    ),
    "demo": Settings(
        "demo",
        {
            "vllm": (
                *("--enforce-eager", "--enable-prompt-tokens-details", "--max-model-len", "8192"),
                *("--max-num-seqs", "8", "--max-num-batched-tokens", "640", "--enable-auto-tool-choice"),
                *("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", *MTP["vllm"]),
            ),
            "sglang": (
                *("--enable-cache-report", "--context-length", "8192", "--max-running-requests", "8"),
                *("--chunked-prefill-size", "256", "--max-mamba-cache-size", "64", *MTP["sglang"]),
                *("--tool-call-parser", "qwen", "--reasoning-parser", "qwen3", "--sleep-on-idle"),
            ),
        },
    ),
    # The commands of Qwen3-Coder-Next, with drafts; on SGLang all else is as by default.
    "coder": Settings(
        "coder",
        {
            "vllm": (
                *("--enforce-eager", "--max-num-seqs", "8", "--enable-auto-tool-choice"),
                *("--tool-call-parser", "qwen3_coder", *MTP["vllm"]),
            ),
            "sglang": ("--tool-call-parser", "qwen3_coder", "--sleep-on-idle", *MTP["sglang"]),
        },
    ),
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
class Server(server.Server):
    """A server that answers, also by ``client``."""

    client: OpenAI

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        return self.client.chat.completions.create(model=NAME, messages=messages, **options)

    def request(
        self, prompt: tuple[int, ...], max_tokens: int, temperature: float, n: int = 1, **more: Any
    ) -> dict[str, Any]:
        """Keyword arguments of a POST that asks ``n`` times for ``max_tokens`` ids and their log-probabilities."""
        sampling = {"temperature": temperature, "ignore_eos": True, "n": n}
        if self.engine == "vllm":
            body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "logprobs": 0, "return_token_ids": True}
            return {"url": "/v1/completions", "json": body | sampling | more}
        sampling["max_new_tokens"] = max_tokens
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return {"url": "/generate", "json": body | more}

    def parse(self, response: httpx.Response) -> Answer:
        (answer,) = self.parse_all(response)
        return answer

    def parse_all(self, response: httpx.Response) -> list[Answer]:
        """The answers to a prompt that asked for several."""
        assert response.status_code == 200, f"{response.status_code}: {response.text[:500]}"
        found = response.json()
        if self.engine == "vllm":
            return [Answer(tuple(c["token_ids"]), tuple(c["logprobs"]["token_logprobs"])) for c in found["choices"]]
        each = [one["meta_info"]["output_token_logprobs"] for one in (found if isinstance(found, list) else [found])]
        return [Answer(tuple(row[1] for row in rows), tuple(row[0] for row in rows)) for rows in each]

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
def serving(
    engine: str, model: Path, flags: Sequence[str], log: Path, env: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """Serve ``model`` with an engine's ``flags`` by our classes, and go on when the server answers."""
    flags = [*flags, "--served-model-name", NAME]
    with server.serving(engine, str(model), flags, log, env=env) as running:
        check_log(engine, False, log)
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=180) as client:
            yield Server(running.engine, running.url, log, running.process, client)
