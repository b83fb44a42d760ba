"""Engines started on a GPU with random weights; their whole distributions against ``transformers``.

Greedy answers with MTP are the same as without exactly if both choose what the reference prefers, which ``wrong``
counts.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.verify.comparison import check_conditions, compare, rounding
from qnext_plugin.verify.runner import Run, Start
from qnext_plugin.verify.scenarios import Scenario, tokens
from qnext_plugin.verify.tolerances import LOGPROB_BFLOAT16_RATIO, SERVED_LOGPROB_FLOAT32
from tests.gpu import cases
from tests.gpu.cases import Case
from tests.gpu.results import deadline
from tests.support.installed import ENGINE
from tests.support.matrix import SCENARIOS

pytestmark = pytest.mark.gpu

CASES = cases.CASES[ENGINE]
AT_ONCE = 5  # engines that start beside each other; each wants a few cores and 8 GiB of the GPU
TIMEOUT = 400.0

PROMPTS = tuple(tokens(length, seed=length) for length in (1, 7, 40, 130, 300, 700))
ASKED = {
    "mixed": Scenario((PROMPTS,)),
    "reuse": SCENARIOS["slot_reuse"],
    "prefix_aba": SCENARIOS["prefix_aba"],
    "multi_turn": SCENARIOS["multi_turn"],
}


def params(*of: Callable[[Case], Any]) -> list[Any]:
    marks = {name: () if case.quick else pytest.mark.exhaustive for name, case in CASES.items()}
    return [pytest.param(name, id=name, marks=marks[name]) for name, case in CASES.items() if all(f(case) for f in of)]


Started = Callable[[str], tuple[Start, str]]


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, child_environment: None, checkpoint: Callable[[str], Path], directory: Path
) -> Iterator[Started]:
    """A function that waits for a start to have answered everything, and returns it and why it failed, if it did.

    Those of all selected tests run, a few beside each other, while the first are judged.
    """

    def run(name: str) -> tuple[Start, str]:
        case = CASES[name]
        runs = [Run(key, scenario(case, key)) for key in case.scenarios]
        where = directory / f"{name.replace(' ', '-')}-{time.time_ns()}"
        start = Start(ENGINE, checkpoint(case.checkpoint), case.config, runs, where)
        try:
            start.run(min(TIMEOUT, deadline(request.config) - time.time()), env=case.env)
        except EngineFailed as e:
            return start, str(e)
        return start, ""

    selected = [item for item in request.session.items if item.path == request.path]
    names = dict.fromkeys(item.callspec.params["name"] for item in selected)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: dict[str, Future[tuple[Start, str]]] = {name: pool.submit(run, name) for name in names}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str, torch.dtype], Any]:
    """A function that returns ``transformers`` on this GPU, by the name of a checkpoint and dtype."""
    from qnext_plugin.verify.reference import Whole  # it imports Triton, whose interpreter other modules here turn on

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return cache(lambda name, dtype: Whole(checkpoint(name), dtype, "cuda" if torch.cuda.is_available() else "cpu"))


def scenario(case: Case, key: str) -> Scenario:
    """With drafts, the model's own guesses: some right, some wrong."""
    return replace(ASKED[key], drafts="own") if case.config.draft_tokens else ASKED[key]


@pytest.mark.parametrize("name", params())
def test_classes_and_kernels_that_serve(
    started: Started, record_property: Callable[[str, Any], None], name: str
) -> None:
    case, (start, failure) = CASES[name], started(name)
    assert start.seconds, failure
    record_property("start_seconds", start.seconds["start"])
    serving = start.serving
    for key, value in serving.items():
        record_property(key, value)
    if ENGINE == "sglang":
        return
    assert set(serving["modules"]) == {"vllm_ext.model", *(["vllm_ext.mtp"] if case.config.draft_tokens else [])}
    assert serving["runner"].startswith("vllm.v1.worker.gpu.") == case.v2
    assert serving["kernels"] and set(case.kernels) <= set(serving["kernels"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param(each.id, key, id=f"{each.id}: {key}", marks=each.marks)
        for each in params()
        for key in CASES[each.id].scenarios
    ],
)
def test_distributions(
    started: Started, reference: Any, record_property: Callable[[str, Any], None], name: str, key: str
) -> None:
    case, (start, failure) = CASES[name], started(name)
    config = case.config
    assert key in start, failure
    result = start[key]
    check_conditions(scenario(case, key), config, result)
    exact = reference(case.checkpoint, torch.float32)
    tolerance = SERVED_LOGPROB_FLOAT32[ENGINE]
    found = compare(result, exact, tolerance if config.dtype == "float32" else float("inf"))
    record_property("difference", found.max)
    record_property("where", found.worst)
    record_property("wrong", len(found.wrong_tokens))
    record_property("acceptance", acceptance(start, key))
    if config.dtype == "float32":
        assert found.max <= tolerance, found.worst
        assert not found.wrong_tokens
        return
    theirs = rounding(result, exact, reference(case.checkpoint, torch.bfloat16))
    record_property("transformers_bf16", theirs.max)
    record_property("ratio", found.usual / theirs.usual)
    # The largest errors are where a rounded router chose another expert, which either does at other positions.
    assert found.usual / theirs.usual <= LOGPROB_BFLOAT16_RATIO, found.worst


@pytest.mark.parametrize("name", params(lambda case: case.config.draft_tokens))
def test_drafts_are_accepted_and_rejected(started: Started, name: str) -> None:
    start, failure = started(name)
    rates = [acceptance(start, key)[0] for key in CASES[name].scenarios if key in start]
    assert any(0.05 < rate < 0.95 for rate in rates), (rates, failure)


def acceptance(start: Start, key: str) -> list[float]:
    """Share of steps that accepted the first draft, the second, ..."""
    result = start[key]
    return [round(accepted / max(1, result.num_drafts), 3) for accepted in result.num_accepted]
