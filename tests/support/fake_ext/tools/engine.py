"""Stands for an adapter's engine where what runs it is tested: the engine ``tests.support.fake``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qnext_plugin.bench.worker import Answered
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Completion
from qnext_plugin.verify.scenarios import Prompt, Scenario
from qnext_plugin.verify.worker import Worker


def start(model: str, config: dict[str, Any], arguments: dict[str, Any]) -> "Engine":
    return Engine(model, EngineConfig(**config), **arguments)


class Engine(Worker):
    """Each request is answered with as many times the length of its prompt as were asked for."""

    block_size, ranks = 16, 1

    def __init__(self, model: str, config: EngineConfig, module: str = __name__) -> None:
        self.config, self.module, self.mutant, self.resets = config, module, "", 0

    def serving(self) -> dict[str, Any]:
        return {"modules": [self.module], "kernels": [], "memory": {"resets": self.resets}}

    def reset(self) -> None:
        self.resets += 1

    @contextmanager
    def broken(self, mutant: str) -> Iterator[None]:
        raise ValueError(f"no mutant {mutant}")
        yield

    def counts(self) -> dict[str, Any]:
        return {"num_preemptions": 0, "num_drafts": 0, "num_accepted": []}

    def drafts_as(self, pattern: str, sequences: list[list[int]]) -> None:
        raise NotImplementedError

    def abort(self, batch: Sequence[Prompt]) -> None:
        raise NotImplementedError

    def generate(self, batch: Sequence[Prompt], scenario: Scenario) -> list[Completion]:
        n = scenario.max_tokens[0]
        rows = torch.arange(2).repeat(n, 1)
        return [Completion(tuple(prompt), (len(prompt),) * n, rows, rows.float()) for prompt in batch]

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answered:
        return Answered(float(num_tokens), [[len(prompt)] * num_tokens for prompt in prompts], 0)
