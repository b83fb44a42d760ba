"""The comparison itself: it must see one wrong number, NaN, a wrong token and a scenario that did nothing."""

import dataclasses
import math

import pytest
import torch

from qnext_plugin.verify.comparison import Completion, Result, check_conditions, compare
from qnext_plugin.verify.scenarios import EngineConfig, Scenario

PROMPT, GENERATED = (3, 1, 4), (1, 5)


def reference(ids):
    torch.manual_seed(0)
    return torch.randn(len(ids), 7).log_softmax(-1)


def served(**changes):
    expected = reference(PROMPT + GENERATED)
    choice = tuple(expected[2:4].argmax(-1).tolist())
    completion = Completion(PROMPT, choice, expected[2:4].clone(), expected[:2].clone())
    return Result(
        [[dataclasses.replace(completion, **changes)]], num_preemptions=0, block_size=32, num_drafts=0, num_accepted=[]
    )


def test_equal_distributions_have_no_difference():
    difference = compare(served(), reference, 1e-4)
    assert difference.value == 0 and not difference.wrong_tokens


@pytest.mark.parametrize("wrong", [0.25, math.nan])
@pytest.mark.parametrize(
    ("field", "row", "where"), [("logprobs", 1, "generated row 1"), ("prompt_logprobs", 0, "row 0")]
)
def test_one_wrong_number_is_found(field, row, where, wrong):
    broken = getattr(served().batches[0][0], field).clone()
    broken[row, 2] += wrong
    difference = compare(served(**{field: broken}), reference)
    assert difference.value == pytest.approx(math.inf if math.isnan(wrong) else wrong, rel=1e-5)
    assert where in difference.where


def test_missing_positions_are_an_error():
    with pytest.raises(AssertionError, match="batch 0 request 0"):
        compare(served(logprobs=torch.zeros(1, 7)), reference)


def test_token_the_reference_would_not_choose_is_named():
    worst = tuple(reference(PROMPT + GENERATED)[2:4].argmin(-1).tolist())
    assert len(compare(served(token_ids=worst), reference, 1e-4).wrong_tokens) == 2


@pytest.mark.parametrize("conditions", [{"hits": ((0, 0),)}, {"preempts": True}])
def test_scenario_that_did_nothing_fails(conditions):
    with pytest.raises(AssertionError, match=r"cached tokens|preempted"):
        check_conditions(Scenario(((PROMPT,),), (), **conditions), EngineConfig("tiny"), served(num_cached_tokens=63))
