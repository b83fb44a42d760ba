"""Requests to a server, and how far its answers are from the reference."""

from dataclasses import dataclass

import torch

from qnext_plugin.verify.rows import Rows
from tests.support.references import TOLERANCE
from tests.support.serving import Answer


@dataclass(frozen=True)
class Request:
    """What is asked; the client goes away after ``dropped_after`` milliseconds, or stays where that is ``None``."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0
    dropped_after: int | None = None


def error(request: Request, answer: Answer, expected: Rows) -> float:
    """Largest difference of log-probability; infinite where a greedy token is not the reference's."""
    chosen = expected.gather(torch.tensor(answer.token_ids)[:, None])[:, 0]
    if request.temperature == 0 and (expected.logprobs.amax(1) - chosen).max() > 2 * TOLERANCE:
        return float("inf")
    return float((chosen - torch.tensor(answer.logprobs)).abs().max())
