"""What a reference is asked and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_IDS = 2048  # how many of a position's most likely ids are kept


@dataclass(frozen=True)
class Rows:
    """What follows some positions of a sequence: the most likely ids of each, ascending, with their log-probabilities.

    ``ids`` and ``logprobs`` are ``[positions, min(vocab_size, MAX_IDS)]``. ``margin[p]`` is by how much the last expert
    chosen, for any token up to there and in any layer, was ahead of the first not chosen, in router logits: where that
    is within rounding, two right implementations take different experts.
    """

    ids: Tensor
    logprobs: Tensor
    margin: Tensor

    @classmethod
    def of(cls, logprobs: Tensor, margin: Tensor) -> "Rows":
        """From whole distributions ``[positions, vocab_size]``."""
        ids = logprobs.topk(min(MAX_IDS, logprobs.shape[-1])).indices.sort(-1).values
        return cls(ids.int(), logprobs.gather(-1, ids).float(), margin)

    @property
    def likeliest(self) -> Tensor:
        """The most likely id of each position."""
        return self.ids.gather(-1, self.logprobs.argmax(-1, keepdim=True))[:, 0]

    def gather(self, ids: Tensor) -> Tensor:
        """Log-probabilities of ``ids`` ``[positions, k]``; of an id not kept, the least one that is: an upper bound."""
        at = torch.searchsorted(self.ids, ids.int()).clamp_max(self.ids.shape[-1] - 1)
        kept = self.ids.gather(-1, at) == ids
        return torch.where(kept, self.logprobs.gather(-1, at), self.logprobs.amin(-1, keepdim=True))


@dataclass(frozen=True)
class Query:
    """The last ``positions`` of ``ids`` that have a successor in it: their rows are asked for."""

    ids: tuple[int, ...]
    positions: int

    @property
    def rows(self) -> slice:
        return slice(len(self.ids) - 1 - self.positions, len(self.ids) - 1)


Reference = Callable[[Sequence[Query]], list[Rows]]
