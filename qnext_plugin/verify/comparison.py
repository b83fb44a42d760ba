"""Judge an engine's answers: compare distributions with a reference, and check that the scenario did its work."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import pvariance
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.rows import Query, Reference
from qnext_plugin.verify.scenarios import Prompt, Scenario

# In float32, router logits of up to about 10 have errors of this size; a smaller margin between experts is a tie.
EXPERT_TIE = 1e-5
RUN = 12  # positions; a wrong state is off in all that follow, other experts in few
CACHE_UNKNOWN = "the server does not say what came from its prefix cache; vLLM does with --enable-prompt-tokens-details"


@dataclass(frozen=True)
class Completion:
    """One answered request.

    ``ids`` and ``logprobs`` ``[positions, k]`` are the engine's most likely ids of each position and their
    log-probabilities. The last ``len(token_ids)`` positions belong to ``token_ids``; any earlier positions belong to
    the end of the prompt. ``num_cached_tokens`` of the prompt came from the prefix cache; None if that is not known.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    ids: Tensor
    logprobs: Tensor
    num_cached_tokens: int | None = 0

    @property
    def query(self) -> Query:
        return Query(self.prompt + self.token_ids, len(self.ids))


@dataclass(frozen=True)
class Result:
    """A scenario's completions by batch, and the engine's counts during the scenario.

    ``num_accepted[i]`` of ``num_drafts`` steps accepted the i-th draft. ``draft_steps`` are the draft steps of a single
    request, if requested: each has the ``position`` of the last accepted token and the ``logits`` from which the drafts
    are drawn. ``seeded`` tells whether the engine honors a request's seed. ``num_preemptions`` is None if it is not
    known.
    """

    batches: list[list[Completion]]
    num_preemptions: int | None
    block_size: int
    num_drafts: int = 0
    num_accepted: list[int] = field(default_factory=list)
    draft_steps: list[dict[str, Any]] = field(default_factory=list)
    seeded: bool = True

    def save(self, file: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for i, batch in enumerate(self.batches):
            for j, c in enumerate(batch):
                sequences = {"prompt": torch.tensor(c.prompt), "token_ids": torch.tensor(c.token_ids)}
                of = sequences | {"ids": c.ids.int(), "logprobs": c.logprobs}
                tensors |= {f"{i}.{j}.{name}": tensor for name, tensor in of.items()}
        counts = {name: value for name, value in vars(self).items() if name != "batches"}
        counts["num_cached_tokens"] = [[c.num_cached_tokens for c in batch] for batch in self.batches]
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"counts": json.dumps(counts)})
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Result":
        with safe_open(file, framework="pt") as f:
            counts = json.loads(f.metadata()["counts"])
        tensors = load_file(file)

        def completion(where: str, num_cached_tokens: int | None) -> Completion:
            prompt, token_ids = (tuple(tensors[f"{where}.{name}"].tolist()) for name in ("prompt", "token_ids"))
            ids, logprobs = tensors[f"{where}.ids"].long(), tensors[f"{where}.logprobs"]
            return Completion(prompt, token_ids, ids, logprobs, num_cached_tokens)

        cached = counts.pop("num_cached_tokens")
        batches = [[completion(f"{i}.{j}", n) for j, n in enumerate(batch)] for i, batch in enumerate(cached)]
        return cls(batches, **counts)


@dataclass
class Difference:
    """The errors of an engine's distributions over ``positions`` positions.

    ``max`` and ``mean`` are the largest and the mean absolute difference of log-probabilities; ``means`` and
    ``maxima`` are those of each position. ``usual`` is the mean without the worst tenth of positions: in a lower
    precision other experts were chosen there, and a few such positions make up most of the mean. ``sustained`` is the
    largest median of the maxima of ``RUN`` positions in a row. ``worst`` is the place of the largest difference.
    ``kl`` is the mean Kullback-Leibler divergence from the reference, with all unreported ids counted as
    one id. ``same_top`` counts positions with the same most likely id. ``ties`` counts further positions that are off
    by more than the tolerance after a tie between experts. Right implementations differ there, so these positions
    count in nothing else. ``wrong_tokens`` lists the places of tokens that the reference would not choose.
    """

    positions: int = 0
    max: float = 0.0
    sustained: float = 0.0
    kl: float = 0.0
    same_top: int = 0
    ties: int = 0
    worst: str = "nowhere"
    wrong_tokens: list[str] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    maxima: list[float] = field(default_factory=list)

    def add(self, actual: Tensor, expected: Tensor, where: Sequence[str]) -> None:
        """Add log-probabilities ``[positions, k]`` of the same ids of one request; NaN counts as infinite."""
        if not len(actual):
            return
        difference = (actual - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        maxima = difference.amax(-1)
        worst = int(maxima.argmax())
        if maxima[worst] > self.max:
            self.max, self.worst = float(maxima[worst]), where[worst]
        if len(maxima) >= RUN:
            self.sustained = max(self.sustained, float(maxima.unfold(0, RUN, 1).median(-1).values.max()))
        self.means += difference.mean(-1).tolist()
        self.maxima += maxima.tolist()
        before, self.positions = self.positions, self.positions + len(actual)
        kl = _kl(expected, actual).nan_to_num(nan=math.inf, posinf=math.inf).sum()
        self.kl = (self.kl * before + float(kl)) / self.positions
        self.same_top += int((actual.argmax(-1) == expected.argmax(-1)).sum())

    @property
    def mean(self) -> float:
        return sum(self.means) / max(1, self.positions)

    @property
    def usual(self) -> float:
        return sum(self._usual) / max(1, len(self._usual))

    @property
    def chance(self) -> float:
        """The standard error of the difference between ``usual`` and that of another such sample."""
        return math.sqrt(2 * pvariance(self._usual) / len(self._usual)) if self._usual else 0.0

    @property
    def _usual(self) -> list[float]:
        return sorted(self.means)[: math.ceil(0.9 * self.positions)]

    @property
    def agreement(self) -> float:
        return self.same_top / self.positions if self.positions else math.nan


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence ``[positions]`` of log-probabilities ``[positions, k]``.

    In each distribution all other ids count as one id.
    """
    p, q = p.double(), q.double()
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp_min(0) for x in (p, q))
    rest = torch.where(rest_p > 1e-6, rest_p * (rest_p / rest_q.clamp_min(1e-12)).log(), 0.0)
    return (p.exp() * (p - q)).sum(-1) + rest


def completions(result: Result) -> Iterator[tuple[str, Completion]]:
    for i, batch in enumerate(result.batches):
        for j, completion in enumerate(batch):
            yield f"batch {i} request {j}", completion


def compare(result: Result, reference: Reference, tolerance: float = math.inf, top_k: int = 1) -> Difference:
    """Compare a result with a reference.

    The reference reads the prompt and the tokens that the engine chose, so one early difference does not hide the
    rest. A chosen token is wrong if the reference prefers ``top_k`` others by more than twice ``tolerance``. Two
    engines that are each within the tolerance can disagree on smaller gaps.
    """
    difference = Difference()
    answered = list(completions(result))
    expected = reference([completion.query for _, completion in answered])
    for (where, completion), rows in zip(answered, expected, strict=True):
        first = len(completion.query.ids) - 1 - len(completion.ids)
        assert completion.logprobs.shape == completion.ids.shape and len(rows.ids) == len(completion.ids), where
        assert len(completion.ids) >= len(completion.token_ids), f"{where}: {len(completion.ids)} distributions"
        exact = rows.closest(completion.ids, completion.logprobs)
        off = (completion.logprobs - exact).abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(-1) > tolerance
        tie = off & (rows.margin < EXPERT_TIE)
        difference.ties += int(tie.sum())
        length = f"{len(completion.prompt)}+{len(completion.token_ids)} tokens"
        places = [f"{where} ({length}) position {first + p}" for p in range(len(completion.ids))]
        counted = (~tie).nonzero()[:, 0].tolist()
        difference.add(completion.logprobs[counted], exact[counted], [places[p] for p in counted])
        prompt_rows = len(completion.ids) - len(completion.token_ids)
        chosen = rows.gather(torch.tensor([[0]] * prompt_rows + [[t] for t in completion.token_ids]))[:, 0]
        gap = rows.logprobs.topk(min(top_k, rows.logprobs.shape[-1])).values[:, -1] - chosen
        wrong = (gap > 2 * tolerance) & ~tie
        difference.wrong_tokens += [places[p] for p in wrong.nonzero()[:, 0].tolist() if p >= prompt_rows]
    return difference


def rounding(result: Result, exact: Reference, rounded: Reference) -> Difference:
    """Return the errors of ``rounded``, `transformers` in a lower precision, on the tokens and ids of a result."""
    difference = Difference()
    answered = [completion for _, completion in completions(result)]
    queries = [completion.query for completion in answered]
    for completion, a, b in zip(answered, exact(queries), rounded(queries), strict=True):
        difference.add(b.gather(completion.ids), a.gather(completion.ids), [""] * len(completion.ids))
    return difference


class NotExercised(Exception):
    """Raised if a scenario did not do what it exists for."""


class Unsteady(Exception):
    """Raised if one seed gave two answers."""


def check_conditions(scenario: Scenario, config: EngineConfig, result: Result) -> None:
    """Check that a scenario did its work.

    Raises ``NotExercised`` if it lacks cache hits over several blocks, preemptions, drafts or their expected
    acceptance, or if that is not known, and ``Unsteady`` if the same seed gave two answers.
    """
    if config.draft_tokens and scenario.drafts != "own":
        rates = [accepted / max(1, result.num_drafts) for accepted in result.num_accepted]
        falling = all(0.02 < b < a - 0.02 for a, b in zip([1.0, *rates], rates, strict=False))
        if len(rates) != config.draft_tokens or (rates[-1] <= 0.85 if scenario.drafts == "right" else not falling):
            raise NotExercised(f"acceptance of {scenario.drafts} drafts by position: {rates}")
    for i, j in scenario.hits:
        if (hit := result.batches[i][j].num_cached_tokens) is None:
            raise NotExercised(CACHE_UNKNOWN)
        if hit < 2 * result.block_size:
            raise NotExercised(f"batch {i} request {j}: {hit} cached tokens, blocks of {result.block_size}")
    if scenario.preempts and result.num_preemptions is None:
        raise NotExercised("the server does not say whether requests were preempted")
    if scenario.preempts and not result.num_preemptions:
        raise NotExercised("no request was preempted")
    if scenario.drafted and not result.num_drafts:
        raise NotExercised("no token was drafted")
    if scenario.sampled and result.seeded:
        said: dict[Prompt, tuple[int, ...]] = {}
        for where, c in completions(result):
            if said.setdefault(c.prompt, c.token_ids) != c.token_ids:
                raise Unsteady(f"{where}: another answer to the same seed")


def check_warm(result: Result) -> None:
    """Raise ``NotExercised`` if a second pass has long enough prompts and was not served from the prefix cache."""
    found = [c.num_cached_tokens for _, c in completions(result) if len(c.prompt) > 3 * result.block_size]
    hits = [hit for hit in found if hit is not None]
    if len(hits) < len(found):
        raise NotExercised(CACHE_UNKNOWN)
    if hits and max(hits) < result.block_size:
        raise NotExercised(f"cached tokens {hits}, blocks of {result.block_size}")


def loops(token_ids: Sequence[int]) -> bool:
    """Return whether an output ends in up to eight tokens repeated at least four times, over at least 16 tokens."""
    spans = [(period, max(16, 4 * period)) for period in range(1, 9)]
    return any(
        len(token_ids) >= span and list(token_ids[-span + period :]) == list(token_ids[-span:-period])
        for period, span in spans
    )
