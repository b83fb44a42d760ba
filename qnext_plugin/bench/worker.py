"""What measures inside an engine's process, with the ``Engine`` of the adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from qnext_plugin.config import QNextConfig
from qnext_plugin.verify.comparison import loops
from qnext_plugin.verify.scenarios import tokens

ROUNDS = 2  # of which the best counts, after one that warms up


@dataclass(frozen=True)
class Answered:
    """To concurrent greedy requests. ``steps``: of each that verified drafts, summed over all; 0 without drafts."""

    seconds: float
    token_ids: list[list[int]]
    steps: int


class Engine(Protocol):
    @property
    def ranks(self) -> int: ...

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        """``num_tokens`` for each prompt, as fast as the engine can."""


Answer = Callable[[Sequence[Sequence[int]], int], Answered]
Prompts = Callable[[int, int], list[Sequence[int]]]
"""Of a batch: how many, how many tokens in each."""


def measure(answer: Answer, random: Prompts, given: Prompts, workloads: dict[str, dict[str, int]]) -> dict[str, Any]:
    """By name; a workload is the arguments of ``prefill``, or of ``decode``, which is on the ``given`` prompts."""
    return {
        name: decode(answer, given, **arguments) if "output" in arguments else prefill(answer, random, **arguments)
        for name, arguments in workloads.items()
    }


def prefill(answer: Answer, prompts: Prompts, batch: int, length: int) -> dict[str, Any]:
    """Prompt tokens per second, until each prompt has its first token."""
    return {"tokens per second": batch * length / _best(answer, prompts, batch, length, 1).seconds}


def decode(answer: Answer, prompts: Prompts, batch: int, length: int, output: int) -> dict[str, Any]:
    """Tokens per second after the first of each sequence: what ``output`` more take than the first alone."""
    first, whole = (_best(answer, prompts, batch, length, n) for n in (1, 1 + output))
    steps = whole.steps - first.steps
    return {
        "tokens per second": batch * output / (whole.seconds - first.seconds),
        **({"tokens per step": batch * output / steps} if steps else {}),
        "looping": sum(loops(ids) for ids in whole.token_ids),
    }


def _best(answer: Answer, prompts: Prompts, batch: int, length: int, num_tokens: int) -> Answered:
    found = [answer(prompts(batch, length), num_tokens) for _ in range(1 + ROUNDS)]
    return min(found[1:], key=lambda each: each.seconds)


_seeds = count()


def random_prompts(vocab_size: int) -> Prompts:
    """Never the same twice in a process, so that no prefix is found in a cache."""
    return lambda batch, length: [tokens(length, next(_seeds), vocab_size) for _ in range(batch)]


def given_prompts(given: list[list[int]]) -> Prompts:
    """The first of them, over again where there are fewer, whatever the length asked for."""
    return lambda batch, _: [given[i % len(given)] for i in range(batch)]


def first_request(engine: Engine, model: str, length: int) -> dict[str, Any]:
    """How many ``ranks`` serve, and seconds of the first request, a token after a random prompt."""
    (prompt,) = random_prompts(QNextConfig.from_pretrained(model).vocab_size)(1, length)
    return {"ranks": engine.ranks, "first request seconds": engine.answer([prompt], 1).seconds}


def measure_engine(
    engine: Engine, model: str, workloads: dict[str, dict[str, int]], prompts: list[list[int]]
) -> dict[str, Any]:
    """``measure`` on random prompts; decodes on ``prompts``, if there are any."""
    drawn = random_prompts(QNextConfig.from_pretrained(model).vocab_size)
    return measure(engine.answer, drawn, given_prompts(prompts) if prompts else drawn, workloads)
