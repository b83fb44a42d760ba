"""What the requests of a Gated DeltaNet layer do in a step; importable without an engine."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Request:
    """``tokens`` [T, ...] are the inputs accepted so far; ``slots`` [1 + drafts] its places in the cache.

    ``accepted`` of the last step's tokens were accepted.
    """

    slots: Tensor
    tokens: Tensor
    accepted: int = 1


@dataclass(frozen=True)
class Turn:
    """One request's part in a step: ``num_tokens`` of prompt or a decode (1), or when ``drafts`` is not None a
    token and that many drafts, of which ``accepted`` (the token itself included) stay."""

    request: Request
    num_tokens: int = 1
    drafts: int | None = None
    accepted: int = 1

    @property
    def length(self) -> int:
        return self.num_tokens if self.drafts is None else 1 + self.drafts
