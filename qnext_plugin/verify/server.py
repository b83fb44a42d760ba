"""A running server that answers scenarios over HTTP; ``dialects`` has what differs between the engines."""

import math
import secrets
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qnext_plugin.engines.client import Client, Refused, ServerFailed
from qnext_plugin.verify.comparison import Completion
from qnext_plugin.verify.rows import Query, Rows
from qnext_plugin.verify.scenarios import SAMPLING, Prompt, Scenario
from qnext_plugin.verify.worker import Answerer, num_logprobs, top

# What a server may have set otherwise, for example from the checkpoint's generation_config.json.
_NEUTRAL = {
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_GREEDY = _NEUTRAL | {"temperature": 0.0}
_SAMPLED = _NEUTRAL | SAMPLING | {"temperature": 1.0}  # SGLang's log-probabilities are those after the temperature
_AT_ONCE = 8  # requests that `Server.rows` makes

Entries = dict[int, float]
"""Log-probabilities of one position by token id."""


@dataclass(frozen=True)
class Facts:
    """What a server says about its start; None where it says nothing.

    ``cache_tokens`` is how many tokens its cache holds, ``step_tokens`` how many it computes in a step at most.
    ``ours`` tells whether classes of this plugin serve.
    """

    version: str
    model: str
    max_model_len: int
    dtype: str | None
    architectures: tuple[str, ...] | None
    drafts: bool | None
    prefix_caching: bool | None
    block_size: int | None
    cache_tokens: int | None
    step_tokens: int | None
    ours: bool | None


class Server(Answerer):
    """A running server. ``num_logprobs`` and ``prompt_logprobs`` tell what it gives: how many, and those of prompts.

    Raises ``ValueError`` from the constructor if the server has another vocabulary or gives no log-probabilities, and
    ``ServerFailed`` from any method.
    """

    engine: str
    path: str
    seeded = False

    def __init__(self, client: Client, facts: Facts, vocab_size: int) -> None:
        self.client, self.facts, self.vocab_size = client, facts, vocab_size
        self._read: dict[Query, Rows] = {}
        self.reset()
        last = (vocab_size - 1,)
        try:
            self._post(last, 1, 0)
        except Refused as e:
            raise ValueError(
                f"MODEL has {vocab_size} token ids, and the server refuses the last of them: {e}"
            ) from None
        self.num_logprobs = self._most_logprobs(last, num_logprobs(vocab_size))
        self.prompt_logprobs = self._serves(last * 2, self.num_logprobs, True)

    @abstractmethod
    def request(self, prompt: Prompt, max_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a request without log-probabilities."""

    @abstractmethod
    def logprobs(self, k: int, of_prompt: bool) -> dict[str, Any]:
        """Return what a request's body says to get ``k`` log-probabilities of each position."""

    @abstractmethod
    def parse(self, answer: dict[str, Any]) -> tuple[list[int], list[Entries], list[Entries], int | None]:
        """Return the ids of an answer, the distributions of prompt and answer, and how much of the prompt was cached.

        There are no distributions of the prompt unless they were asked for.
        """

    def reset(self) -> None:
        """From now on share no prefixes with earlier requests: prefixes are found under the same salt only."""
        self.salt = secrets.token_hex(8)

    def generate(self, batch: Sequence[Prompt], scenario: Scenario) -> list[Completion]:
        counts = [scenario.max_tokens[i % len(scenario.max_tokens)] for i in range(len(batch))]
        post = partial(self._post, k=self.num_logprobs, of_prompt=scenario.prompt_logprobs, sampled=scenario.sampled)
        with ThreadPoolExecutor(len(batch)) as clients:
            answers = list(clients.map(post, batch, counts))
        return [
            self._completion(prompt, n, scenario.prompt_logprobs, answer)
            for prompt, n, answer in zip(batch, counts, answers, strict=True)
        ]

    def abort(self, batch: Sequence[Prompt]) -> None:
        bodies = [self.request(prompt, 100, _GREEDY) | {"stream": True} for prompt in batch]
        with ExitStack() as open_responses, ThreadPoolExecutor(len(batch)) as clients:
            streams = list(clients.map(partial(self.client.open, self.path), bodies))
            for stream in streams:
                open_responses.enter_context(stream)
            streams[0].readline()  # now this one decodes

    def rows(self, queries: Sequence[Query]) -> list[Rows]:
        """Return what the server computes when it reads the sequences of queries, each as a prompt.

        This makes the server a ``Reference``. It does not say how close its choices of experts were.
        """
        missing = [query for query in dict.fromkeys(queries) if query not in self._read]
        post = partial(self._post, max_tokens=1, k=self.num_logprobs, of_prompt=True)
        with ThreadPoolExecutor(_AT_ONCE) as clients:
            answers = list(clients.map(post, [query.ids[:-1] for query in missing]))
        for query, answer in zip(missing, answers, strict=True):
            read = self._completion(query.ids[:-1], 1, True, answer)
            ids, order = read.ids[-query.positions :].sort(-1)
            logprobs = read.logprobs[-query.positions :].gather(-1, order)
            self._read[query] = Rows(ids.int(), logprobs, torch.full((query.positions,), math.inf))
        return [self._read[query] for query in queries]

    def _post(
        self, prompt: Prompt, max_tokens: int, k: int, of_prompt: bool = False, sampled: bool = False
    ) -> dict[str, Any]:
        body = self.request(prompt, max_tokens, _SAMPLED if sampled else _GREEDY)
        return self.client.json(self.path, body | (self.logprobs(k, of_prompt) if k else {}))

    def _serves(self, prompt: Prompt, k: int, of_prompt: bool = False) -> bool:
        try:
            self._post(prompt, 1, k, of_prompt)
        except Refused:
            return False
        return True

    def _most_logprobs(self, prompt: Prompt, wanted: int) -> int:
        """Return how many log-probabilities of each position the server gives, ``wanted`` at most."""
        if self._serves(prompt, wanted):
            return wanted
        served, refused = 0, wanted
        while refused - served > 1:
            middle = (served + refused) // 2
            served, refused = (middle, refused) if self._serves(prompt, middle) else (served, middle)
        if not served:
            raise ValueError(f"{self.client.url}: the server gives no log-probabilities")
        return served

    def _completion(self, prompt: Prompt, max_tokens: int, of_prompt: bool, answer: dict[str, Any]) -> Completion:
        try:
            token_ids, prompt_rows, rows, cached = self.parse(answer)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
            raise self._unusable(f"it lacks log-probabilities that were asked for ({type(e).__name__}: {e})") from None
        expected = max_tokens, max_tokens, len(prompt) - 1 if of_prompt else 0
        if (len(token_ids), len(rows), len(prompt_rows)) != expected:
            found = f"{len(token_ids)} tokens with {len(rows)} distributions, and {len(prompt_rows)} of the prompt"
            raise self._unusable(f"expected {expected[1]} tokens and {expected[2]} of the prompt, found {found}")
        rows = prompt_rows + rows
        if any(len(row) < self.num_logprobs for row in rows):
            raise self._unusable(f"it has fewer than {self.num_logprobs} log-probabilities of a position")
        if (largest := max(max(row) for row in rows)) >= self.vocab_size:
            raise self._unusable(f"it names token id {largest}, and MODEL has {self.vocab_size}: another vocabulary")
        if max(max(row.values()) for row in rows) > 1e-3:
            raise self._unusable("its log-probabilities are above 0; vLLM needs --logprobs-mode raw_logprobs")
        ids, logprobs = (
            torch.tensor(column) for column in zip(*(top(r, self.num_logprobs) for r in rows), strict=True)
        )
        return Completion(prompt, tuple(token_ids), ids, logprobs, cached)

    def _unusable(self, why: str) -> ServerFailed:
        return ServerFailed(f"{self.client.url}: an answer cannot be judged: {why}")
