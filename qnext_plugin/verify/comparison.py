"""How an engine's answers are judged: whole distributions against a reference, and did the scenario happen at all.

The engine side turns each request into a ``Completion`` with its full log-probability distributions.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qnext_plugin.verify.scenarios import EngineConfig, Scenario


@dataclass(frozen=True)
class Completion:
    """One answered request. ``logprobs`` is ``[len(token_ids), vocab_size]`` in float32, row t for ``token_ids[t]``.

    ``prompt_logprobs``, where asked for, is ``[len(prompt) - 1, vocab_size]``, row p for ``prompt[p + 1]``.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """A scenario's completions by batch, and what the engine counted meanwhile.

    ``num_accepted[i]`` of ``num_drafts`` steps accepted the i-th draft.
    """

    batches: list[list[Completion]]
    num_preemptions: int
    block_size: int
    num_drafts: int
    num_accepted: list[int]


@dataclass
class Difference:
    """Largest absolute log-probability difference, where it is, and tokens the reference would not have chosen."""

    value: float = 0.0
    where: str = "nowhere"
    wrong_tokens: list[str] = field(default_factory=list)

    def add(self, difference: torch.Tensor, where: str) -> None:
        """Fold in ``[positions, vocab_size]``; NaN counts as infinite."""
        if difference.numel() == 0:
            return
        by_position = difference.abs().nan_to_num(nan=math.inf).amax(-1)
        position = int(by_position.argmax())
        if by_position[position] > self.value:
            self.value, self.where = float(by_position[position]), f"{where} row {position} of {len(by_position)}"


def to_result(raw: Mapping[str, Any]) -> Result:
    """Parse what an engine's worker wrote as JSON."""

    def completion(c: Mapping[str, Any]) -> Completion:
        prompt_logprobs = c["prompt_logprobs"]
        return Completion(
            prompt=tuple(c["prompt"]),
            token_ids=tuple(c["token_ids"]),
            logprobs=torch.tensor(c["logprobs"]),
            prompt_logprobs=None if prompt_logprobs is None else torch.tensor(prompt_logprobs),
            num_cached_tokens=c["num_cached_tokens"],
        )

    batches = [[completion(c) for c in batch] for batch in raw["batches"]]
    counts = {name: raw[name] for name in ("num_preemptions", "block_size", "num_drafts", "num_accepted")}
    return Result(batches, **counts)


def requests(result: Result) -> Iterable[tuple[str, Completion]]:
    for i, batch in enumerate(result.batches):
        for j, completion in enumerate(batch):
            yield f"batch {i} request {j} ({len(completion.prompt)} prompt tokens)", completion


def compare(
    result: Result, reference: Callable[[tuple[int, ...]], torch.Tensor], tolerance: float = math.inf
) -> Difference:
    """Hold a result against ``reference``, which maps ids ``[n]`` to next-token log-probabilities ``[n, vocab_size]``.

    The reference reads the prompt and the tokens the engine itself chose, so one early difference does not hide the
    rest. A chosen token is wrong where the reference prefers another by more than twice ``tolerance``: two engines
    each within it can disagree on smaller gaps.
    """
    difference = Difference()
    for where, completion in requests(result):
        expected = reference(completion.prompt + completion.token_ids)
        generated = expected[len(completion.prompt) - 1 : -1]
        assert completion.logprobs.shape == generated.shape, f"{where}: {tuple(completion.logprobs.shape)}"
        difference.add(completion.logprobs - generated, f"{where}, generated")
        if completion.prompt_logprobs is not None:
            difference.add(completion.prompt_logprobs - expected[: len(completion.prompt) - 1], f"{where}, prompt")
        gap = generated.amax(-1) - generated.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        difference.wrong_tokens += [f"{where}, generated {t}" for t in (gap > 2 * tolerance).nonzero()[:, 0].tolist()]
    return difference


def check_conditions(scenario: Scenario, config: EngineConfig, result: Result) -> None:
    """Assert that the scenario did what it exists for: prefix hits over several blocks, preemptions, acceptance."""
    if config.draft_tokens and scenario.drafts != "own":
        rates = [accepted / result.num_drafts for accepted in result.num_accepted]
        assert len(rates) == config.draft_tokens, rates
        if scenario.drafts == "right":
            assert rates[-1] > 0.85, f"right drafts were rejected: {rates}"
        else:
            assert all(0.02 < b < a - 0.02 for a, b in zip([1.0, *rates], rates, strict=False)), (
                f"not every number of accepted drafts came up: {rates}"
            )
    for i, j in scenario.hits:
        hit = result.batches[i][j].num_cached_tokens
        assert hit >= 2 * result.block_size, (
            f"batch {i} request {j}: {hit} cached tokens, blocks of {result.block_size}"
        )
    if scenario.preempts:
        assert result.num_preemptions > 0, "no request was preempted"
