"""A served model's log-probabilities, full distributions at every position, against float32 `transformers`."""

import pytest
import torch

from tests.engines.installed import ENGINE
from tests.engines.mutants import mutants
from tests.engines.reference import reference
from tests.engines.scenarios import CONFIGS, SCENARIOS, Difference, check_conditions, compare, pairs, requests
from tests.tolerances import LOGPROB_BFLOAT16_RATIO, SERVED_LOGPROB_FLOAT32

pytestmark = pytest.mark.engine

MUTANTS = mutants(ENGINE)
TOLERANCE = SERVED_LOGPROB_FLOAT32[ENGINE]
FLOAT32 = [pair for pair in pairs(ENGINE) if CONFIGS[pair[0]].dtype == "float32"]
BFLOAT16 = [pair for pair in pairs(ENGINE) if CONFIGS[pair[0]].dtype == "bfloat16"]


@pytest.mark.parametrize(("config", "scenario"), FLOAT32)
def test_float32(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    check_conditions(SCENARIOS[scenario], result)
    difference = compare(result, reference(checkpoint(CONFIGS[config].checkpoint)), TOLERANCE)
    print(f"{config} {scenario}: {difference.value:.2g} at {difference.where}")
    assert difference.value <= TOLERANCE, f"{difference.value:.3g} at {difference.where}"
    assert not difference.wrong_tokens


@pytest.mark.parametrize(("config", "scenario"), BFLOAT16)
def test_bfloat16_is_as_close_as_transformers(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    check_conditions(SCENARIOS[scenario], result)
    directory = checkpoint(CONFIGS[config].checkpoint)
    exact, rounded = reference(directory), reference(directory, torch.bfloat16)
    ours, theirs = compare(result, exact), Difference()
    for where, completion in requests(result):
        ids = completion.prompt + completion.token_ids
        generated = slice(len(completion.prompt) - 1, -1)
        theirs.add(rounded(ids)[generated] - exact(ids)[generated], where)
    print(f"{config} {scenario}: {ours.value:.3g} at {ours.where}; transformers {theirs.value:.3g} at {theirs.where}")
    assert ours.value <= LOGPROB_BFLOAT16_RATIO * theirs.value, f"{ours.value:.3g} at {ours.where}"


@pytest.mark.parametrize("config", [name for name, config in CONFIGS.items() if ENGINE in config.engines])
def test_expected_kernels_ran(serve, config):
    assert serve(config).kernels == expected_kernels(ENGINE, CONFIGS[config].dtype)


def expected_kernels(engine, dtype):
    if engine == "sglang":
        return ["decode", "extend"]
    conv = "cpp" if dtype == "bfloat16" and torch.cpu._is_avx512_bf16_supported() else "torch"
    delta = "cpp" if dtype == "bfloat16" else "torch"
    return [f"{phase}: {conv}, {delta}" for phase in ("decode", "prefill")]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(serve, checkpoint, mutant):
    """And by the scenario that names it: unbroken, in the same engine, that one passes above."""
    config, scenario = MUTANTS[mutant].config, MUTANTS[mutant].scenario
    assert (config, scenario) in FLOAT32
    difference = compare(serve(config)[mutant], reference(checkpoint(CONFIGS[config].checkpoint)), TOLERANCE)
    print(f"{mutant}: {difference.value:.3g} at {difference.where}")
    assert difference.value > 100 * TOLERANCE
