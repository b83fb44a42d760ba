"""Sampling with MTP draws from the distribution that it draws from without, and a request gets what it asks for."""

import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest
import torch

from tests.support.installed import ENGINE
from tests.support.sampling import MUTANT, NUMBERS, SCHEMA, TOKENS, UNITS, WORDS


def p_value(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Two-sample chi-square test of homogeneity; rare categories are one."""
    counts = [Counter(a), Counter(b)]
    total, sizes = counts[0] + counts[1], [len(a), len(b)]
    common = [category for category, n in total.items() if n * min(sizes) / sum(sizes) >= 5]
    table = torch.tensor([[c[category] for category in common] for c in counts], dtype=torch.float64)
    rest = torch.tensor(sizes)[:, None] - table.sum(1, keepdim=True)
    table = torch.cat([table, rest], dim=1)
    expected = table.sum(0) * (torch.tensor(sizes, dtype=torch.float64) / sum(sizes))[:, None]
    used = expected.amin(0) > 0
    statistic = ((table - expected).square() / expected)[:, used].sum()
    freedom = torch.tensor(int(used.sum()) - 1, dtype=torch.float64)
    assert freedom >= 5, "too few categories to tell distributions apart"
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("position", range(1, TOKENS))
def test_distribution_is_the_one_without_mtp(samples, position):
    """Of each verified token, and of it with the token before."""
    plain, mtp = samples[0][""], samples[2][""]
    assert 0.05 < samples[2]["accepted"] < 0.95, "drafts have to be accepted at times and rejected at times"
    assert p_value([s[position] for s in plain], [s[position] for s in mtp]) > 1e-4
    pairs = [[tuple(s[position - 1 : position + 1]) for s in drawn] for drawn in (plain, mtp)]
    assert p_value(*pairs) > 1e-4


def test_a_wrong_state_shows_in_the_distribution(samples):
    plain, broken = samples[0][""], samples[2][MUTANT]
    assert min(p_value([s[i] for s in plain], [s[i] for s in broken]) for i in range(1, TOKENS)) < 1e-12


def test_greedy_answers_are_those_without_drafts_whatever_is_asked_for(samples):
    expected, found = samples[0]["greedy"], samples[2]["greedy"]
    assert found["without"] == expected["without"]
    for i, name in enumerate(expected["names"]):
        assert expected["own"][i] != expected["without"][i], f"{name} changed nothing"
        assert found["own"][i] == expected["own"][i], name
        assert found["drafted"][i] == expected["own"][i], f"{name}, right and wrong drafts"
    assert all(count > 2 for count in found["accepted"]), found["accepted"]


def is_of_the_schema(text):
    value = json.loads(text)
    return (
        value.keys() == SCHEMA["properties"].keys()
        and value["unit"] in UNITS
        and 2 <= len(value["numbers"]) <= 4
        and all(number in NUMBERS for number in value["numbers"])
        and value["yes"] in (True, False)
    )


@pytest.mark.parametrize(
    "backend", {"vllm": ["xgrammar", "guidance", "outlines"], "sglang": ["xgrammar", "llguidance"]}[ENGINE]
)
def test_answers_with_drafts_are_of_their_form_by_every_backend(samples, backend):
    found = samples[2]["structured"][backend]
    print(found)
    for _, text in found["own"] + found["drafted"]:
        assert re.fullmatch(WORDS, text) if text[0] != "{" else is_of_the_schema(text)
    assert all(count > 5 for count in found["accepted"])
