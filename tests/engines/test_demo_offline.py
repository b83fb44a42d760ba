"""Recall of the trained demo checkpoint in a float32 engine: right on prefix hits, lost without the recurrent state."""

import pytest

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Result, check_conditions, compare
from qnext_plugin.verify.runner import Run, Start
from tests.support import demo
from tests.support.installed import ENGINE, MUTANTS
from tests.support.references import whole
from tests.support.tolerances import LOGPROB_FLOAT32

CONFIG = {
    "vllm": EngineConfig(draft_tokens=2, prefix_caching=True, token_budget=512, num_blocks=120),
    "sglang": EngineConfig(draft_tokens=2, prefix_caching=True, token_budget=256),
}[ENGINE]


@pytest.fixture(scope="module")
def offline(tmp_path_factory, checkpoint, warm) -> dict[str, Result]:
    """Recall on prefix hits in one float32 engine, as it is and with the recurrent state dropped at each restore."""
    dropped = next(m.path for m in MUTANTS if m.applied.__name__ == "state_dropped_at_prefix_restore")
    runs = [Run("intact", demo.RECALL), Run("dropped", demo.RECALL, mutant=dropped)]
    root = tmp_path_factory.mktemp("offline") / "recall"
    start = Start(ENGINE, checkpoint("demo"), CONFIG, runs, root)
    with warm.forking():
        start.run(timeout=600)
    return {run.key: start[run.key] for run in runs}


def test_float32_is_what_transformers_computes(offline, checkpoint):
    """Also with MTP, whose drafts are mostly accepted here: the answer is the one without it."""
    check_conditions(demo.RECALL, CONFIG, offline["intact"])
    difference = compare(offline["intact"], whole(checkpoint("demo")), LOGPROB_FLOAT32)
    print(f"largest log-probability difference {difference.max:.2g} at {difference.worst}")
    assert difference.max <= LOGPROB_FLOAT32, difference.worst
    assert not difference.wrong_tokens


def test_recall_fails_without_the_recurrent_state(offline):
    right, broken = recalled(offline["intact"]), recalled(offline["dropped"])
    print(f"recall on prefix hits: {right:.0%}, without the recurrent state {broken:.0%}")
    assert right >= 0.9
    assert broken <= 0.5


def recalled(result: Result) -> float:
    """The share of right answers among those that began with a prefix hit."""
    answers = zip(result.batches[1], demo.RECALLED, strict=True)
    right = [c.token_ids[: len(p.answer_ids)] == p.answer_ids for c, (_, p) in answers]
    return sum(right) / len(right)
