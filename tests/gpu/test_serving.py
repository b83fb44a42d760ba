"""Tokens per second end to end, recorded: our model and vLLM's own, each in a process that stays, measured in turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from qnext_plugin.bench.report import summary
from qnext_plugin.bench.side import Measure, Side, Task, offline
from tests.support.installed import ENGINE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(ENGINE != "vllm", reason="written for vLLM only"),
]

WORKLOADS = {
    "prefill 8x2048": {"batch": 8, "length": 2048},
    **{f"prefill 1x{n}": {"batch": 1, "length": n} for n in (600, 1000, 2000, 4000, 8000)},
    "decode batch 1": {"batch": 1, "length": 32, "output": 128},
    "decode batch 8": {"batch": 8, "length": 32, "output": 128},
    "decode batch 64": {"batch": 64, "length": 32, "output": 128},
}
# Four engines share the GPU. With prefix caching, as served by default: it decides how prompts are cut into steps.
FLAGS = (
    "--enable-prefix-caching",
    *("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(5 << 30)),
)
SIDES = (Side("ours", "vllm", flags=FLAGS), Side("native", "vllm", native=True, flags=FLAGS))


@pytest.fixture(scope="module")
def sides(
    request: pytest.FixtureRequest, child_environment: None, checkpoint: Callable[[str], Path], directory: Path
) -> Iterator[dict[int, dict[str, Measure]]]:
    """What measures each side, by number of draft tokens. All load at once; while one is measured the others wait."""
    drafts = dict.fromkeys(
        item.callspec.params["drafts"] for item in request.session.items if hasattr(item, "callspec")
    )
    model = str(checkpoint("serving"))

    def side(side: Side, drafts: int) -> AbstractContextManager[Measure]:
        return offline(
            side, Task(model, WORKLOADS, draft_tokens=drafts), directory / f"{side.name}-{drafts}-{time.time_ns()}"
        )

    with ExitStack() as stack:
        yield {n: {each.name: stack.enter_context(side(each, n)) for each in SIDES} for n in drafts}


@pytest.fixture(scope="module")
def pairs() -> dict[int, list[dict[str, Any]]]:
    """What was measured so far, by number of draft tokens."""
    return {0: [], 2: []}


def test_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    """It can be written while the GPU does something else; ``scripts/gpu-check`` does."""
    assert (checkpoint("serving") / "config.json").exists()


@pytest.mark.parametrize("drafts", [2, pytest.param(0, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_pair(
    sides: dict[int, dict[str, Measure]],
    pairs: dict[int, list[dict[str, Any]]],
    record_property: Callable[[str, Any], None],
    number: int,
    drafts: int,
) -> None:
    pairs[drafts].append({name: measure() for name, measure in sides[drafts].items()})
    table = summary(pairs[drafts])
    for name, row in table.items():
        record_property(f"{name}, ratio", row["ratio"])
    decodes = [row["ratio"] for name, row in table.items() if name.startswith("decode")]
    record_property("target", "met" if min(decodes) >= (1.1 if drafts else 1.0) else "missed")
    record_property("mtp", drafts)
    record_property("workloads", table)
