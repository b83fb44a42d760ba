"""A served model's log-probabilities, full distributions at every position, against float32 `transformers`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qnext_plugin.config import QNextConfig
from qnext_plugin.reference import ReferenceModel
from qnext_plugin.verify.comparison import Difference, check_conditions, compare, requests
from qnext_plugin.verify.reference import reference
from qnext_plugin.verify.scenarios import CONFIGS, SCENARIOS, configs, pairs
from tests.engines.installed import ENGINE, MUTANTS
from tests.tolerances import LOGPROB_BFLOAT16_RATIO, SERVED_LOGPROB_FLOAT32

pytestmark = pytest.mark.engine

TOLERANCE = SERVED_LOGPROB_FLOAT32[ENGINE]
FLOAT32 = [pair for pair in pairs(ENGINE) if CONFIGS[pair[0]].dtype == "float32"]
BFLOAT16 = [pair for pair in pairs(ENGINE) if CONFIGS[pair[0]].dtype == "bfloat16"]


@pytest.mark.parametrize(("config", "scenario"), FLOAT32)
def test_float32(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    check_conditions(SCENARIOS[scenario], CONFIGS[config], result)
    difference = compare(result, reference(checkpoint(CONFIGS[config].checkpoint)), TOLERANCE)
    print(f"{config} {scenario}: {difference.value:.2g} at {difference.where}")
    assert difference.value <= TOLERANCE, f"{difference.value:.3g} at {difference.where}"
    assert not difference.wrong_tokens


@pytest.mark.parametrize(("config", "scenario"), BFLOAT16)
def test_bfloat16_is_as_close_as_transformers(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    check_conditions(SCENARIOS[scenario], CONFIGS[config], result)
    directory = checkpoint(CONFIGS[config].checkpoint)
    exact, rounded = reference(directory), reference(directory, torch.bfloat16)
    ours, theirs = compare(result, exact), Difference()
    for where, completion in requests(result):
        ids = completion.prompt + completion.token_ids
        generated = slice(len(completion.prompt) - 1, -1)
        theirs.add(rounded(ids)[generated] - exact(ids)[generated], where)
    print(f"{config} {scenario}: {ours.value:.3g} at {ours.where}; transformers {theirs.value:.3g} at {theirs.where}")
    assert ours.value <= LOGPROB_BFLOAT16_RATIO * theirs.value, f"{ours.value:.3g} at {ours.where}"


@pytest.mark.parametrize("config", [config for config, scenario in FLOAT32 if SCENARIOS[scenario].draft_logits])
def test_draft_computes_what_the_oracle_does(serve, checkpoint, config):
    difference = compare_draft(serve(config), "draft_logits", checkpoint(CONFIGS[config].checkpoint))
    print(f"{config} draft: {difference.value:.2g} at {difference.where}")
    assert difference.value <= TOLERANCE, f"{difference.value:.3g} at {difference.where}"


def compare_draft(served: Any, scenario: str, checkpoint: Path) -> Difference:
    """Every draft step's log-probabilities against the reference's MTP, first and further drafts."""
    model = ReferenceModel(QNextConfig.from_pretrained(checkpoint), load_file(checkpoint / "model.safetensors"))
    completion = served[scenario].batches[0][0]
    sequence = torch.tensor(completion.prompt + completion.token_ids)
    _, hidden = model.forward(sequence)
    difference, steps = Difference(), served.draft_steps(scenario)
    assert len(steps) > 5
    for step in steps:
        n = step["position"] + 1
        following, states = sequence[1 : n + 1], hidden[:n]
        for i, logits in enumerate(step["logits"]):
            expected, drafted = model.mtp_forward(following, states)
            actual = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
            difference.add((actual - expected[-1].log_softmax(-1))[None], f"position {n}, draft {i}")
            following = torch.cat([following, torch.tensor(logits).argmax()[None]])
            states = torch.cat([states, drafted[-1:]])
    return difference


@pytest.mark.parametrize("config", configs(ENGINE))
def test_expected_kernels_ran(serve, config):
    assert serve(config).kernels == expected_kernels(ENGINE, CONFIGS[config])


def expected_kernels(engine, config):
    if engine == "sglang":
        packed = config.dtype == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        phases = ["extend", "verify"] if config.draft_tokens else ["decode", "extend"]
        return sorted([*phases, *(["packed"] if packed else [])])
    fast = config.dtype == "bfloat16"
    conv = "cpp" if fast and torch.cpu._is_avx512_bf16_supported() else "torch"
    delta = "cpp" if fast else "torch"
    phases = ("prefill", "verify") if config.draft_tokens else ("decode", "prefill")
    return [f"{phase}: {conv}, {delta}" for phase in phases]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(serve, checkpoint, mutant):
    """And by the scenario that names it: unbroken, in the same engine, that one passes above."""
    config, scenario = MUTANTS[mutant].config, MUTANTS[mutant].scenario
    assert (config, scenario) in FLOAT32
    directory = checkpoint(CONFIGS[config].checkpoint)
    if SCENARIOS[scenario].draft_logits:
        difference = compare_draft(serve(config), mutant, directory)
    else:
        difference = compare(serve(config)[mutant], reference(directory), TOLERANCE)
    print(f"{mutant}: {difference.value:.3g} at {difference.where}")
    assert difference.value > 100 * TOLERANCE
