"""A served model's log-probabilities, full distributions at every position, against float32 `transformers`."""

import pytest
import torch

from qnext_plugin.verify.comparison import Unsteady, check_conditions, check_warm, compare, rounding
from qnext_plugin.verify.tolerances import LOGPROB_BFLOAT16_RATIO
from tests.support.installed import ENGINE, MUTANTS
from tests.support.matrix import CONFIGS, MATRIX, SCENARIOS, configs
from tests.support.references import TOLERANCE, compare_draft, whole
from tests.support.starts import runs

ALL = [(config, run.key) for config in configs(ENGINE) for run in runs(config) if not run.mutant]
FLOAT32 = [pair for pair in ALL if CONFIGS[pair[0]].dtype == "float32"]
HALF = [pair for pair in ALL if pair not in FLOAT32]  # bfloat16 and float16


def check_happened(config, key, result):
    (run,) = (run for run in runs(config) if run.key == key)
    check_conditions(run.scenario, CONFIGS[config], result)
    if run.warm:
        check_warm(result)
    return run.scenario


@pytest.mark.parametrize(("config", "scenario"), FLOAT32)
def test_float32(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    asked = check_happened(config, scenario, result)
    expected = whole(checkpoint(MATRIX[config].checkpoint))
    difference = compare(result, expected, TOLERANCE, asked.top_k)
    print(f"{config} {scenario}: {difference.max:.2g} at {difference.worst}")
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
    assert not difference.wrong_tokens
    assert difference.ties <= difference.positions / 10


@pytest.mark.parametrize(("config", "scenario"), HALF)
def test_half_precision_is_as_close_as_transformers(serve, checkpoint, config, scenario):
    result = serve(config)[scenario]
    check_happened(config, scenario, result)
    directory = checkpoint(MATRIX[config].checkpoint)
    rounded = whole(directory, getattr(torch, CONFIGS[config].dtype))
    ours, theirs = compare(result, whole(directory)), rounding(result, whole(directory), rounded)
    print(f"{config} {scenario}: {ours.max:.3g} at {ours.worst}; transformers {theirs.max:.3g} at {theirs.worst}")
    assert ours.max <= LOGPROB_BFLOAT16_RATIO * theirs.max, f"{ours.max:.3g} at {ours.worst}"


@pytest.mark.parametrize("config", [config for config, scenario in FLOAT32 if scenario == "draft_logits"])
def test_draft_computes_what_the_oracle_does(serve, checkpoint, config):
    difference = compare_draft(serve(config)["draft_logits"], checkpoint(MATRIX[config].checkpoint))
    print(f"{config} draft: {difference.max:.2g} at {difference.worst}")
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"


@pytest.mark.parametrize("config", configs(ENGINE))
def test_expected_kernels_ran(serve, config):
    expected = expected_kernels(ENGINE, CONFIGS[config])
    if MATRIX[config].interpreted == "kernels":
        expected = ["prefill: triton, torch", "verify: triton, triton"]
    assert serve(config).serving["kernels"] == expected


@pytest.mark.parametrize("config", [config for config in configs(ENGINE) if MATRIX[config].interpreted])
def test_second_runner_serves(serve, config):
    serving, scheduled_ahead = serve(config).serving, MATRIX[config].interpreted != "cpu"
    assert (serving["runner"], serving["async"]) == ("vllm.v1.worker.cpu.model_runner", scheduled_ahead)


def expected_kernels(engine, config):
    avx2 = torch.cpu._is_avx2_supported() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    avx512 = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    if engine == "sglang":
        packed = config.dtype == "bfloat16" and (avx2 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        phases = ["extend", "verify"] if config.draft_tokens else ["compiled", "decode", "extend"]
        compiled = avx2 or avx512
        return sorted([*phases, *(["products" if compiled else "packed"] if packed else [])])
    fast = config.dtype == "bfloat16"
    conv = ("cpp" if torch.cpu._is_avx512_bf16_supported() else "compiled") if fast else "torch"
    step = "verify" if config.draft_tokens else "decode"
    deltas = {
        step: "cpp" if fast else "torch",
        "prefill": "cpp" if fast and torch.cpu._is_avx512_supported() else "torch",
    }
    products = []
    if fast and avx512:
        products = ["experts: packed", *(["draft head: int8"] if config.draft_tokens else [])]
    elif fast and avx2:
        products = ["experts: compiled"]
    return sorted([f"{phase}: {conv}, {delta}" for phase, delta in deltas.items()] + products)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(serve, checkpoint, mutant):
    """And by the scenario that names it: unbroken, in the same engine, that one passes above."""
    assert (mutant.config, mutant.scenario) in FLOAT32
    result, directory = serve(mutant.config)[mutant.name], checkpoint(MATRIX[mutant.config].checkpoint)
    asked = SCENARIOS[mutant.scenario]
    if asked.draft_logits:
        difference = compare_draft(result, directory)
    else:
        difference = compare(result, whole(directory), TOLERANCE, asked.top_k)
    print(f"{mutant.name}: {difference.max:.3g} at {difference.worst}, {len(difference.wrong_tokens)} wrong tokens")
    if mutant.harmless:
        assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
    elif asked.sampled:
        # The distributions are right, what is drawn from them is not.
        assert difference.wrong_tokens or one_seed_two_answers(mutant, result)
    else:
        assert difference.max > 100 * TOLERANCE


def one_seed_two_answers(mutant, result):
    with pytest.raises(Unsteady, match="another answer to the same seed"):
        check_conditions(SCENARIOS[mutant.scenario], CONFIGS[mutant.config], result)
    return True


def test_every_scenario_can_fail():
    caught = {mutant.scenario for mutant in MUTANTS if not mutant.harmless}
    assert caught == {run.key for config in configs(ENGINE) for run in runs(config) if not (run.mutant or run.warm)}
