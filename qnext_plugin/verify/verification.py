"""Run a plan on an engine and judge every scenario."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.verify.comparison import (
    RUN,
    Difference,
    NotExercised,
    Result,
    Unsteady,
    check_conditions,
    check_warm,
    compare,
    completions,
    loops,
    rounding,
)
from qnext_plugin.verify.reference import Recorded
from qnext_plugin.verify.report import NOT_EXERCISED, OK, Row
from qnext_plugin.verify.rows import Reference
from qnext_plugin.verify.runner import Run, Start
from qnext_plugin.verify.starts import Plan
from qnext_plugin.verify.tolerances import CHANCE, LARGEST_BFLOAT16_RATIO, LOGPROB_BFLOAT16_RATIO, LOGPROB_FLOAT32

TIMEOUT = 7200.0  # seconds for a start, and for each scenario
Bounds = tuple[float, float, float | None]
"""Limits of a difference's largest, usual and sustained errors; the last is for a lower precision."""


def serve(
    checkpoint: Path, engine: str, plan: Plan, directory: Path, native: bool, say: Callable[[str], None]
) -> tuple[list[Start], dict[str, str]]:
    """Run every start of a plan, one after another; returns the starts, and the reasons of failed ones by name."""
    starts, failures = [], {}
    for name, (config, runs) in plan.starts.items():
        start = Start(engine, checkpoint, config, runs, directory / name, native)
        starts.append(start)
        try:
            start.run(TIMEOUT, say, env=gpu_environment(config) if torch.cuda.is_available() else {})
        except EngineFailed as e:
            failures[name] = e.reason
            say(f"{name}: engine failed: {e}")
    return starts, failures


def gpu_environment(config: EngineConfig) -> dict[str, str]:
    """Return what an engine on a GPU needs in its environment to be verified; what the user has set stays.

    Triton's products are in TF32 unless they are told to be exact, which is an error of 1e-3 in float32.
    """
    needed = {"TRITON_F32_DEFAULT": "ieee"} if config.dtype == "float32" else {}
    return {name: value for name, value in needed.items() if name not in os.environ}


def judge(starts: Sequence[Start], failures: Mapping[str, str], recorded: Recorded) -> list[Row]:
    """Return a row for every scenario of every start. In a failed start, the first unanswered row has the reason.

    In float32 every position must be within the tolerance. In a lower precision, a scenario's usual error is compared
    with that of `transformers` on the same tokens, and its sustained and largest errors with those of `transformers`
    in all scenarios. When a choice of experts flips, both are off by similar amounts, though not at the same positions.
    """
    answered = _answered(starts)
    queries = [completion.query for _, _, result in answered for _, completion in completions(result)]
    roundings: dict[tuple[str, str], Difference] = {}
    exact = recorded.of(torch.float32)
    exact(queries)  # all at once, so that each layer is read only once
    for dtype in {start.config.dtype for start in starts} - {"float32"}:
        rounded = recorded.of(getattr(torch, dtype))
        rounded(queries)
        lower = [(s.name, run.key, result) for s, run, result in answered if s.config.dtype == dtype]
        roundings |= {(name, key): rounding(result, exact, rounded) for name, key, result in lower}
    return _rows(starts, failures, exact, _bounds(roundings))


def judge_against(start: Start, failures: Mapping[str, str], reference: Reference, other: Start) -> list[Row]:
    """Return a row for every scenario of a server's ``start``, compared with another server, the ``reference``.

    In float32 every position must be within the tolerance. In a lower precision, the errors are compared with the
    largest that the other server has between the tokens that it wrote, in ``other``, and its own reading of them.
    """
    bounds = {}
    if start.config.dtype != "float32":
        noise = {("", run.key): compare(result, reference) for _, run, result in _answered([other])}
        most = [max(each) for each in zip(*_bounds(noise).values(), strict=True)]
        bounds = {(start.name, run.key): (most[0], most[1], most[2]) for run in start.runs}
    return _rows([start], failures, reference, bounds)


def _bounds(roundings: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Bounds]:
    """Return the bounds in a lower precision, from the errors of a right implementation in it."""
    maxima = torch.tensor([error for difference in roundings.values() for error in difference.maxima])
    if not len(maxima):
        return {}
    largest = LARGEST_BFLOAT16_RATIO * float(maxima.max())
    sustained = LOGPROB_BFLOAT16_RATIO * float(maxima.quantile(0.98))
    return {
        where: (largest, LOGPROB_BFLOAT16_RATIO * difference.usual + CHANCE * difference.chance, sustained)
        for where, difference in roundings.items()
    }


def _answered(starts: Sequence[Start]) -> list[tuple[Start, Run, Result]]:
    return [(start, run, start[run.key]) for start in starts for run in start.runs if run.key in start]


def _rows(
    starts: Sequence[Start],
    failures: Mapping[str, str],
    exact: Reference,
    bounds: Mapping[tuple[str, str], Bounds],
) -> list[Row]:
    """Return the rows; ``bounds`` are those in a lower precision."""
    rows: dict[tuple[str, str], Row] = {}
    reasons = dict(failures)
    for start, run, result in _answered(starts):
        where = start.name, run.key
        if where in bounds:
            difference = compare(result, exact)
            limits: Bounds = bounds[where]
        else:
            limits = LOGPROB_FLOAT32, LOGPROB_FLOAT32, None
            difference = compare(result, exact, LOGPROB_FLOAT32, run.scenario.top_k)
        said = sum(loops(completion.token_ids) for _, completion in completions(result))
        verdict = _verdict(start, run, result, difference, limits)
        rows[where] = Row(start.name, run.key, verdict, difference, *limits, loops=said)
    return [
        rows.get((start.name, run.key)) or Row(start.name, run.key, _not_run(reasons.pop(start.name, None)))
        for start in starts
        for run in start.runs
    ]


def _not_run(reason: str | None) -> str:
    return f"engine failed: {reason}" if reason else "not run"


def _verdict(start: Start, run: Run, result: Result, difference: Difference, bounds: Bounds) -> str:
    bound, usual_bound, sustained_bound = bounds
    if not math.isfinite(difference.max) or difference.max > bound:
        return f"off by more than {bound:.2g}"
    if difference.usual > usual_bound:
        return f"off by more than {usual_bound:.2g} at nine positions in ten"
    if sustained_bound is not None and difference.sustained > sustained_bound:
        return f"off by more than {sustained_bound:.2g} at most of {RUN} positions in a row"
    if difference.wrong_tokens:
        return f"{len(difference.wrong_tokens)} tokens that the reference would not choose"
    if difference.ties > difference.positions:
        return "most positions are behind ties between experts"
    try:
        check_conditions(run.scenario, start.config, result)
        if run.warm:
            check_warm(result)
    except NotExercised as e:
        return f"{NOT_EXERCISED}: {e}"
    except Unsteady as e:
        return str(e)
    return OK
