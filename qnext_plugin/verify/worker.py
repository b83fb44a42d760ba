"""Make the requests of scenarios: of an engine inside its process, or of a server.

An adapter's ``tools.engine`` subclasses ``Worker``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.scenarios import Prompt, Scenario

FULL_VOCAB = 2048  # larger vocabularies are compared on the most likely ids only
MOST_LIKELY = 256


class Answerer(ABC):
    """Who answers requests. Cached prefixes are multiples of ``block_size``. ``seeded``: whether seeds are honored."""

    block_size: int
    seeded = True

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Return ``num_preemptions``, ``num_drafts`` and ``num_accepted`` (by position) since the start.

        ``num_preemptions`` is None if it is not known.
        """

    @abstractmethod
    def generate(self, batch: Sequence[Prompt], scenario: Scenario) -> list[Completion]:
        """Answer the requests of a batch concurrently."""

    @abstractmethod
    def abort(self, batch: Sequence[Prompt]) -> None:
        """Start requests, and drop them before they finish."""

    def answers(self, scenario: Scenario) -> Result:
        """Make all requests of a scenario in order, and return the answers."""
        before = self.counts()
        if scenario.aborted:
            self.abort(scenario.aborted)
        batches = [self.generate(batch, scenario) for batch in scenario.batches]
        said = batches[0][0]
        for turn in scenario.turns:
            batches.append(self.generate([(*said.prompt, *said.token_ids, *turn)], scenario))
            said = batches[-1][0]
        after = self.counts()
        preemptions = after["num_preemptions"]
        if preemptions is not None:
            preemptions -= before["num_preemptions"] or 0  # a server's counter may appear with its first request
        return Result(
            batches,
            num_preemptions=preemptions,
            block_size=self.block_size,
            num_drafts=after["num_drafts"] - before["num_drafts"],
            num_accepted=[b - a for a, b in zip(before["num_accepted"], after["num_accepted"], strict=True)],
            seeded=self.seeded,
        )


class Worker(Answerer):
    """An engine that was started with ``config``."""

    config: EngineConfig

    @abstractmethod
    def __init__(self, model: str, config: EngineConfig) -> None: ...

    @abstractmethod
    def serving(self) -> dict[str, Any]:
        """Return the serving classes' ``modules``, our ``kernels`` that have run, and the sizes in ``memory``."""

    @abstractmethod
    def reset(self) -> None:
        """Empty the prefix cache."""

    @abstractmethod
    def broken(self, mutant: str) -> AbstractContextManager[Any]:
        """Break the model with ``mutant``, a ``module:function``, while the context lasts.

        The cache is emptied before and after.
        """

    @abstractmethod
    def drafts_as(self, pattern: str, sequences: list[list[int]]) -> None:
        """From now on draft right or wrong continuations of ``sequences``, according to ``pattern``."""

    def run(self, scenario: Scenario, reset: bool) -> Result:
        """Answer a scenario. If it prescribes drafts, answer it first without them to learn the right ones."""
        if reset:
            self.reset()
        if not self.config.draft_tokens or scenario.drafts == "own":
            return self.answers(scenario)
        plain = self.answers(replace(scenario, draft_logits=False))
        self.drafts_as(scenario.drafts, [[*c.prompt, *c.token_ids] for batch in plain.batches for c in batch])
        if reset:
            self.reset()
        try:
            return self.answers(scenario)
        finally:
            self.drafts_as("own", [])


def run(engine: Worker, scenario: dict[str, Any], mutant: str, reset: bool, file: str) -> None:
    """Answer a scenario, given by its fields, and save the result in ``file``.

    The model is broken by ``mutant``, unless that is "".
    """
    with engine.broken(mutant) if mutant else nullcontext():
        engine.run(Scenario(**scenario), reset).save(Path(file))


def num_logprobs(vocab_size: int) -> int:
    """Return how many of each distribution's most likely ids are compared."""
    return vocab_size if vocab_size <= FULL_VOCAB else MOST_LIKELY


def top(entries: dict[int, float], k: int) -> tuple[list[int], list[float]]:
    """Return the ``k`` most likely ids and their log-probabilities from an engine's ``entries`` for one position."""
    best = sorted(entries, key=entries.__getitem__, reverse=True)[:k]
    assert len(best) == k, f"{len(best)} log-probabilities of {k}"
    return best, [entries[i] for i in best]
