"""The part of an engine's side that knows no engine: measure workloads whenever told, and write what was found.

An adapter's ``bench`` extends its ``verify.Engine`` and calls ``main``:
``python -m vllm_ext.tools.bench SPEC.json OUT``.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from qnext_plugin.config import QNextConfig
from qnext_plugin.verify.comparison import loops
from qnext_plugin.verify.scenarios import EngineConfig, tokens
from qnext_plugin.verify.worker import check_modules

ROUNDS = 2  # of which the best counts, after one that warms up


@dataclass(frozen=True)
class Answered:
    """To concurrent greedy requests. ``steps``: of each that verified drafts, summed over all; 0 without drafts."""

    seconds: float
    token_ids: list[list[int]]
    steps: int


class Engine(Protocol):
    def __init__(self, model: str, config: EngineConfig) -> None: ...

    ranks: int

    def serving(self) -> dict[str, Any]: ...

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


def random_prompts(vocab_size: int) -> Prompts:
    """Never the same twice, so that no prefix is found in a cache."""
    seeds = count()
    return lambda batch, length: [tokens(length, next(seeds), vocab_size) for _ in range(batch)]


def given_prompts(given: list[list[int]]) -> Prompts:
    """The first of them, over again where there are fewer, whatever the length asked for."""
    return lambda batch, _: [given[i % len(given)] for i in range(batch)]


def main(engine_class: type[Engine]) -> None:
    """Follow ``SPEC.json``; write ``OUT/serving.json`` after the start, ``OUT/<i>.json`` for line i of the input.

    ``SPEC`` holds ``model`` (a checkpoint directory), ``config`` (the fields of an ``EngineConfig``), ``expect_module``
    (start of the module names of the classes that must serve), ``begun`` (time of the start), ``workloads`` (see
    ``measure``) and ``prompts`` (for decodes, or none for random ones).
    """
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    engine = engine_class(spec["model"], EngineConfig(**spec["config"]))
    started = time.time() - spec["begun"]
    modules = engine.serving()["modules"]
    check_modules(modules, spec["expect_module"])
    drawn = random_prompts(QNextConfig.from_pretrained(spec["model"]).vocab_size)
    first = engine.answer(drawn(1, min(w["length"] for w in spec["workloads"].values())), 1).seconds
    about = {"modules": modules, "ranks": engine.ranks, "start-up seconds": started, "first request seconds": first}
    given = given_prompts(spec["prompts"]) if spec["prompts"] else drawn
    for i, _ in enumerate(sys.stdin):
        found = measure(engine.answer, drawn, given, spec["workloads"])
        part = out / "part"
        part.write_text(json.dumps(about | {"workloads": found}))
        part.rename(out / f"{i}.json")
    sys.stdout.flush()
    os._exit(0)  # shutting an engine down can wait for ever; the caller ends the whole process group
