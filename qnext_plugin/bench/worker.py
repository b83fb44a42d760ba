"""Measure inside an engine's process, with the adapter's ``Engine``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from qnext_plugin.config import QNextConfig
from qnext_plugin.verify.comparison import loops
from qnext_plugin.verify.scenarios import tokens

ROUNDS = 2  # measured rounds, of which the best counts; one more round before them warms up


@dataclass(frozen=True)
class Answered:
    """The answers to concurrent greedy requests.

    ``steps`` is the sum, over all requests, of the steps that verified drafts; it is 0 without drafts.
    """

    seconds: float
    token_ids: list[list[int]]
    steps: int


class Engine(Protocol):
    @property
    def ranks(self) -> int: ...

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        """Generate ``num_tokens`` tokens for each prompt, as fast as the engine can."""


Answer = Callable[[Sequence[Sequence[int]], int], Answered]
Prompts = Callable[[int, int], list[Sequence[int]]]
"""A function of the number of prompts in a batch and the number of tokens in each that returns the prompts."""


def measure(answer: Answer, random: Prompts, given: Prompts, workloads: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Measure each workload and return the results by name.

    A workload has the arguments of ``prefill``, which takes ``random`` prompts, or of ``decode``, which takes the
    ``given`` ones.
    """
    return {
        name: decode(answer, given, **arguments) if "output" in arguments else prefill(answer, random, **arguments)
        for name, arguments in workloads.items()
    }


def prefill(answer: Answer, prompts: Prompts, batch: int, length: int) -> dict[str, Any]:
    """Measure prompt tokens per second, until each prompt has its first token."""
    return {"tokens per second": batch * length / _best(answer, prompts, batch, length, 1).seconds}


def decode(answer: Answer, prompts: Prompts, batch: int, length: int, output: int) -> dict[str, Any]:
    """Measure tokens per second after the first token of each sequence.

    The time is how much longer ``output`` more tokens take than the first token alone.
    """
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
    """Return a function that makes random prompts; none repeats in a process, so no prefix is found in a cache."""
    return lambda batch, length: [tokens(length, next(_seeds), vocab_size) for _ in range(batch)]


def given_prompts(given: list[list[int]]) -> Prompts:
    """Return a function that takes the first prompts of ``given``, whatever their length.

    It starts again from the first if there are too few.
    """
    return lambda batch, _: [given[i % len(given)] for i in range(batch)]


def first_request(engine: Engine, model: str, length: int) -> dict[str, Any]:
    """Return the number of serving ``ranks`` and the seconds of the first request, one token after a random prompt."""
    (prompt,) = random_prompts(QNextConfig.from_pretrained(model).vocab_size)(1, length)
    return {"ranks": engine.ranks, "first request seconds": engine.answer([prompt], 1).seconds}


def measure_engine(
    engine: Engine, model: str, workloads: dict[str, dict[str, int]], prompts: list[list[int]]
) -> dict[str, Any]:
    """Call ``measure`` on random prompts; decodes take ``prompts`` instead, if there are any."""
    drawn = random_prompts(QNextConfig.from_pretrained(model).vocab_size)
    return measure(engine.answer, drawn, given_prompts(prompts) if prompts else drawn, workloads)
