"""The comparison itself: it must see one wrong number, NaN, a wrong token and a scenario that did nothing."""

import dataclasses
import math

import pytest
import torch

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import (
    Completion,
    Difference,
    NotExercised,
    Result,
    Unsteady,
    check_conditions,
    check_warm,
    compare,
    loops,
)
from qnext_plugin.verify.rows import MAX_IDS, Rows
from qnext_plugin.verify.scenarios import Scenario

PROMPT, VOCAB = (3, 1, 4), 7


def logprobs(ids):
    torch.manual_seed(0)
    return torch.randn(len(ids), VOCAB).log_softmax(-1)


def reference(queries, margin=1.0):
    whole = [logprobs(query.ids)[query.rows] for query in queries]
    return [Rows.of(rows, torch.full((len(rows),), margin)) for rows in whole]


def served(token_ids=None, positions=4, **changes):
    """What agrees with the reference, but for the changes, in another order of ids."""
    expected = logprobs((*PROMPT, 0, 0))
    token_ids = token_ids or tuple(expected[2:4].argmax(-1).tolist())
    rows = expected[4 - positions : 4]
    ids = rows.argsort(-1, descending=True)
    completion = Completion(PROMPT, token_ids, ids, rows.gather(-1, ids))
    return Result([[dataclasses.replace(completion, **changes)]], num_preemptions=0, block_size=32)


@pytest.mark.parametrize("positions", [2, 4])
def test_equal_distributions_have_no_difference(positions):
    difference = compare(served(positions=positions), reference, 1e-4)
    assert (difference.max, difference.mean, difference.positions) == (0, 0, positions)
    assert abs(difference.kl) < 1e-12 and difference.agreement == 1 and not difference.wrong_tokens


@pytest.mark.parametrize("wrong", [0.25, math.nan])
@pytest.mark.parametrize("row", [0, 3])
def test_one_wrong_number_is_found(row, wrong):
    result = served()
    result.batches[0][0].logprobs[row, 2] += wrong
    difference = compare(result, reference)
    expected = math.inf if math.isnan(wrong) else wrong
    assert difference.max == pytest.approx(expected, rel=1e-5)
    assert difference.mean == pytest.approx(expected / 4 / VOCAB, rel=1e-5)
    assert difference.worst == f"batch 0 request 0 (3+2 tokens) position {row}"


def test_divergence_and_agreement_are_of_the_distributions():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.3, 0.6, 0.1]]).log()
    difference = Difference()
    difference.add(q, p, ["here"])
    difference.add(p, p, ["there"])
    assert difference.kl == pytest.approx((0.7 * math.log(7 / 3) + 0.2 * math.log(1 / 3)) / 2, rel=1e-5)
    assert difference.agreement == 0.5


def test_probability_left_out_of_the_reported_ids_shows_in_the_divergence():
    reported, expected = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.5, 0.3]]).log()
    difference = Difference()
    difference.add(reported, expected, ["here"])
    assert difference.kl == pytest.approx(0.3 * math.log(3) + 0.2 * math.log(0.2 / 0.4), rel=1e-5)


def test_missing_positions_are_an_error():
    with pytest.raises(AssertionError, match="batch 0 request 0"):
        compare(served(logprobs=torch.zeros(1, 7)), reference)
    with pytest.raises(AssertionError, match="1 distributions"):
        compare(served(positions=1), reference)


@pytest.mark.parametrize(("rank", "top_k", "wrong"), [(1, 1, 1), (2, 2, 1), (1, 2, 0), (0, 1, 0)])
def test_token_the_reference_would_not_choose_is_named(rank, top_k, wrong):
    by_rank = logprobs((*PROMPT, 0, 0))[2:4].argsort(-1, descending=True).tolist()
    difference = compare(served((by_rank[0][0], by_rank[1][rank])), reference, 1e-4, top_k)
    assert difference.wrong_tokens == ["batch 0 request 0 (3+2 tokens) position 3"] * wrong


@pytest.mark.parametrize(("margin", "ties"), [(1e-7, 1), (1e-4, 0)])
def test_positions_behind_a_tie_between_experts_are_counted_apart(margin, ties):
    result = served()
    result.batches[0][0].logprobs[1, 2] += 1
    difference = compare(result, lambda queries: reference(queries, margin), 1e-4)
    assert (difference.ties, difference.positions) == (ties, 4 - ties)
    assert difference.max == pytest.approx(1 - ties)


def test_ids_beyond_the_kept_ones_are_bounded():
    whole = torch.randn(1, MAX_IDS + 5).log_softmax(-1)
    rows, order = Rows.of(whole, torch.ones(1)), whole.argsort(-1, descending=True)
    kept, dropped = order[:, :MAX_IDS], order[:, MAX_IDS:]
    assert torch.equal(rows.gather(kept), whole.gather(-1, kept))
    assert torch.equal(rows.gather(dropped), whole.gather(-1, kept[:, -1:]).expand(-1, 5))


def test_results_survive_their_file(tmp_path):
    result = dataclasses.replace(served(), num_accepted=[2, 1], draft_steps=[{"position": 3, "logits": [[0.5]]}])
    result.save(tmp_path / "result.safetensors")
    loaded = Result.load(tmp_path / "result.safetensors")
    assert dataclasses.replace(loaded, batches=[]) == dataclasses.replace(result, batches=[])
    assert compare(loaded, reference).max == 0 and compare(loaded, reference).positions == 4


@pytest.mark.parametrize(
    "conditions", [{"hits": ((0, 0),)}, {"preempts": True}, {"drafts": "cycle"}, {"drafts": "right"}]
)
def test_scenario_that_did_nothing_fails(conditions):
    config = EngineConfig(draft_tokens=2 if "drafts" in conditions else 0)
    result = dataclasses.replace(served(num_cached_tokens=63), num_drafts=9, num_accepted=[0, 0])
    with pytest.raises(NotExercised, match=r"cached tokens|preempted|acceptance"):
        check_conditions(Scenario(((PROMPT,),), **conditions), config, result)


def test_second_pass_without_hits_fails():
    long = served(prompt=tuple(range(100)), num_cached_tokens=31)
    with pytest.raises(NotExercised, match="cached tokens"):
        check_warm(long)
    check_warm(served(prompt=tuple(range(100)), num_cached_tokens=32))


def test_two_answers_to_one_seed_fail():
    (first,) = served().batches[0]
    other = dataclasses.replace(first, token_ids=first.token_ids[::-1])
    result = dataclasses.replace(served(), batches=[[first], [first, other]])
    with pytest.raises(Unsteady, match="batch 1 request 1: another answer"):
        check_conditions(Scenario(((PROMPT,),), sampled=True), EngineConfig(), result)


@pytest.mark.parametrize(
    ("output", "loop"),
    [([5] * 16, True), ([5] * 15, False), ([1, 2, 3] * 6, True), ([9, 9] + [1, 2, 3] * 5 + [1], True),
     ([1, 2, 3] * 5, False), (list(range(8)) * 4, True), (list(range(9)) * 6, False), ([1, 2] * 9 + [3], False)],
)  # fmt: skip
def test_loop_at_the_end_of_an_output(output, loop):
    assert loops(output) == loop
