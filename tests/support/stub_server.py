"""A server of vLLM or SGLang as far as ``qnext verify --url`` asks one, over a model that is a table."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from qnext_plugin.verify.rows import Query, Rows
from tests.support.listening import listening

VOCAB = 331
BLOCK = 32
Row = dict[int, float]
"""Log-probabilities by token id."""


class Table:
    """A model whose next token depends on the last two and on how many there are.

    Its logits are off by ``off`` times noise, which differs between what is read and what is written.
    """

    def __init__(self, vocab_size: int = VOCAB, off: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.last, self.before, self.noise = (
            torch.randn(vocab_size, vocab_size, generator=generator) for _ in range(3)
        )
        self.off = off

    def logprobs(self, ids: Sequence[int], first: int = 0, read: bool = True) -> Tensor:
        """Return the distributions ``[len(ids) - first, vocab_size]`` after each token from the ``first`` on."""
        at, positions = torch.tensor(ids), torch.arange(first, len(ids))
        last, before = at[first:], torch.cat([at[:1], at[:-1]])[first:]
        noise = self.noise[(last + 7 * positions + 13 * read) % len(self.noise)]
        logits = 3 * self.last[last] + 3 * self.before[before] + positions[:, None].cos() * self.last[:1]
        return (logits + self.off * noise).log_softmax(-1)

    def of(self, dtype: torch.dtype) -> Callable[[Sequence[Query]], list[Rows]]:
        """Stand for ``Recorded``."""
        return self.rows

    def rows(self, queries: Sequence[Query]) -> list[Rows]:
        return [Rows.of(self.logprobs(q.ids)[q.rows], torch.full((q.positions,), torch.inf)) for q in queries]


@dataclass
class Stub:
    """How a server behaves. ``change`` gets the distributions of each answer, prompt first, to change them."""

    engine: str
    model: Table
    change: Callable[[tuple[int, ...], list[Row]], list[Row]] = lambda prompt, rows: rows
    choose: Callable[[Tensor], int] = lambda logprobs: int(logprobs.argmax())
    max_logprobs: int = 20
    prompt_logprobs: bool = True
    cached_tokens: bool = True
    drafts: bool = True
    metrics: bool = True
    key: str = ""
    fail_after: int = 10**9
    silent: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    dropped: int = 0
    requests: int = 0
    steps: int = 0

    @property
    def vocab_size(self) -> int:
        return len(self.model.last)

    def get(self, path: str) -> dict[str, Any] | str | None:
        card = {"id": "m", "max_model_len": 1024}
        sglang: dict[str, Any] = {
            "/server_info": {
                "version": "0.5.23",
                "internal_states": [{}],
                "dtype": "float32",
                "chunked_prefill_size": 128,
                "max_total_num_tokens": 900,
                "speculative_algorithm": "NEXTN" if self.drafts else None,
                **self.info,
            },
            "/model_info": {"architectures": ["Qwen3NextForCausalLM"]} | self.info,
        }
        own = {"vllm": {"/version": {"version": "0.32.0"}}, "sglang": sglang}.get(self.engine, {})
        found = own | {"/v1/models": {"data": [card]}} | ({"/metrics": self.counters()} if self.metrics else {})
        return found.get(path)

    def counters(self) -> str:
        cache = f'block_size="{BLOCK}",enable_prefix_caching="True",num_gpu_blocks="20"'
        lines = [
            f"vllm:cache_config_info{{{cache}}} 1.0",
            'vllm:num_preemptions_total{engine="0"} ' + str(self.requests),
        ]
        if self.drafts:
            lines.append(f'vllm:spec_decode_num_drafts_total{{engine="0"}} {self.steps}.0')
            lines.append(f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {self.steps}.0')
        retracted = f'sglang:num_retracted_requests_total{{tp_rank="0"}} {self.requests}'
        if self.engine == "sglang":  # whose counters appear after some requests
            lines = [retracted] * (self.requests > 14)
        return "# HELP something\n" + "\n".join(lines) + "\n"

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        sglang = self.engine == "sglang"
        params = body["sampling_params"] if sglang else body
        prompt = tuple(body["input_ids"] if sglang else body["prompt"])
        k = body.get("top_logprobs_num", 0) if sglang else body.get("logprobs", 0)
        of_prompt = body.get("logprob_start_len") == 0 if sglang else body.get("prompt_logprobs") is not None
        if max(prompt) >= self.vocab_size:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        if k > self.max_logprobs or (of_prompt and not self.prompt_logprobs):
            return 400, {"message": f"{k} logprobs, allowed are {self.max_logprobs}"}
        assert params["ignore_eos"] and params["top_p"] == params["repetition_penalty"] == 1

        ids = prompt
        for _ in range(params["max_new_tokens" if sglang else "max_tokens"]):
            ids = (*ids, self.choose(self.model.logprobs(ids, len(ids) - 1, read=False)[0]))
        written = ids[len(prompt) :]
        self.steps += len(written)
        read, wrote = self.model.logprobs(prompt), self.model.logprobs(ids, read=False)
        whole = [*(read[: len(prompt) - 1] if of_prompt else []), *wrote[len(prompt) - 1 : -1]]
        best = [row.topk(k) for row in whole] if k else []
        rows = [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in best]
        rows = self.change(prompt, rows)
        split = len(rows) - len(written) if k else 0
        cached = self.cached(body["extra_key" if sglang else "cache_salt"], prompt, ids)
        answer = sglang_answer if sglang else vllm_answer
        return 200, answer(written, rows[:split] if of_prompt else None, rows[split:], cached)

    def cached(self, salt: str, prompt: tuple[int, ...], ids: tuple[int, ...]) -> int | None:
        found = max((common(prompt[:-1], known) for known in self.seen.get(salt, [])), default=0)
        self.seen.setdefault(salt, []).append(ids)
        return found // BLOCK * BLOCK if self.cached_tokens else None


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def vllm_answer(
    written: tuple[int, ...], prompt_rows: list[Row] | None, rows: list[Row], cached: int | None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"token_ids": written, "logprobs": None}
    if rows:
        choice["logprobs"] = {"top_logprobs": [{f"token_id:{i}": value for i, value in row.items()} for row in rows]}
    if prompt_rows is not None:
        choice["prompt_logprobs"] = [None, *({i: {"logprob": v} for i, v in row.items()} for row in prompt_rows)]
    details = None if cached is None else {"cached_tokens": cached}
    return {"choices": [choice], "usage": {"prompt_tokens_details": details}}


def sglang_answer(
    written: tuple[int, ...], prompt_rows: list[Row] | None, rows: list[Row], cached: int | None
) -> dict[str, Any]:
    meta: dict[str, Any] = {"cached_tokens": cached, "spec_verify_ct": len(written)}
    if rows:
        meta["output_token_logprobs"] = [[0.0, i, None] for i in written]
        meta["output_top_logprobs"] = [[[value, i, None] for i, value in row.items()] for row in rows]
    if prompt_rows is not None:
        meta["input_top_logprobs"] = [None, *([[v, i, None] for i, v in row.items()] for row in prompt_rows)]
    return {"meta_info": meta}


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    """Yield the URL at which ``stub`` answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = stub.get(urlsplit(self.path).path)
            self.reply(404 if found is None else 200, "Not Found" if found is None else found)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if stub.silent:
                stop.wait(30)
            stub.requests += 1
            if stub.key and self.headers["Authorization"] != f"Bearer {stub.key}":
                self.reply(401, {"error": "Unauthorized"})
            elif stub.requests > stub.fail_after:
                self.reply(500, {"error": {"message": "EngineCore died"}})
            elif body.get("stream"):
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # written until the client has gone
                    for _ in range(1000):
                        self.wfile.write(b"data: {}\n\n")
                        stop.wait(0.005)
                    return
                stub.dropped += 1
            elif self.path in ("/v1/completions", "/generate"):
                with lock:
                    status, answer = stub.complete(body)
                self.reply(status, answer)
            else:
                self.reply(404, "Not Found")

        def reply(self, status: int, answer: dict[str, Any] | str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

        def log_message(self, *args: Any) -> None:
            pass

    lock, stop = threading.Lock(), threading.Event()
    with listening(Handler) as url:
        try:
            yield url
        finally:
            stop.set()
