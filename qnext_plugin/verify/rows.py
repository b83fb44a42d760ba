"""The questions to a reference and its answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_IDS = 2048  # how many of a position's most likely ids are kept


@dataclass(frozen=True)
class Rows:
    """The distributions after some positions of a sequence.

    ``ids`` are the most likely ids of each position in ascending order, and ``logprobs`` are their log-probabilities;
    both are ``[positions, min(vocab_size, MAX_IDS)]``. ``margin[p]`` is the smallest difference in router logits
    between the last chosen expert and the first not chosen, over all layers and all tokens up to that position. If it
    is within rounding, two right implementations may choose different experts.
    """

    ids: Tensor
    logprobs: Tensor
    margin: Tensor

    @classmethod
    def of(cls, logprobs: Tensor, margin: Tensor) -> "Rows":
        """Build rows from whole distributions ``[positions, vocab_size]``."""
        ids = logprobs.topk(min(MAX_IDS, logprobs.shape[-1])).indices.sort(-1).values
        return cls(ids.int(), logprobs.gather(-1, ids).float(), margin)

    @property
    def likeliest(self) -> Tensor:
        """The most likely id of each position."""
        return self.ids.gather(-1, self.logprobs.argmax(-1, keepdim=True))[:, 0]

    def gather(self, ids: Tensor) -> Tensor:
        """Return the log-probabilities of ``ids`` ``[positions, k]``.

        An id that is not kept gets the smallest log-probability that is kept, which is an upper bound.
        """
        return self.closest(ids, torch.full((), torch.inf))

    def closest(self, ids: Tensor, logprobs: Tensor) -> Tensor:
        """Return what ``gather`` does, except for ids that are not kept.

        Of what these can be, at most the smallest that is kept, they get what is closest to ``logprobs``, so that a
        difference found is the least that there can be.
        """
        at = torch.searchsorted(self.ids, ids.int()).clamp_max(self.ids.shape[-1] - 1)
        kept = self.ids.gather(-1, at) == ids
        return torch.where(kept, self.logprobs.gather(-1, at), self.logprobs.amin(-1, keepdim=True).minimum(logprobs))


@dataclass(frozen=True)
class Query:
    """A question for the rows of the last ``positions`` positions of ``ids`` that have a successor in ``ids``."""

    ids: tuple[int, ...]
    positions: int

    @property
    def rows(self) -> slice:
        return slice(len(self.ids) - 1 - self.positions, len(self.ids) - 1)


Reference = Callable[[Sequence[Query]], list[Rows]]
