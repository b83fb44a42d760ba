"""Quantized checkpoints served by SGLang, with NEXTN, against `transformers` with the same dequantized weights.

In bfloat16 every layer is served in its codes. In float32 it is dequantized while loading, and held to the bound of an
unquantized checkpoint; there one engine has the other formats loaded over the first, which is how weights are updated.
"""

import json
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.verify.comparison import Result, check_conditions, compare, rounding
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.scenarios import Scenario, tokens
from tests.support.quantized import FORMS, SCENARIO, by_two, dequantized, write
from tests.support.references import TOLERANCE, compare_draft
from tests.support.tolerances import LOGPROB_QUANTIZED_RATIO

# What the draft computes is compared itself: a wrong one is corrected by the model, and not seen otherwise.
DRAFT = Scenario(((tokens(61, seed=7),),), drafts="cycle", draft_logits=True)
CONFIG = EngineConfig(draft_tokens=2)
BFLOAT16 = replace(CONFIG, dtype="bfloat16")
# Four experts, each twice, in no order, as a load balancer leaves them.
PHYSICAL = [2, 0, 3, 2, 1, 3, 0, 1]
LOCATION = json.dumps({"physical_to_logical_map": [PHYSICAL, PHYSICAL[::-1]] * 2})
BALANCED = ("--ep-size", "2", "--ep-num-redundant-experts", "4", "--init-expert-location", LOCATION)
DEQUANTIZED = "dequantized while loading: "
# What SGLang has to be told first on a CPU comes first.
ORDER = ("gptq", *(name for name in FORMS if name != "gptq"))
STARTS = {
    "one process": BFLOAT16,
    "float32": CONFIG,
    "TP 2": replace(BFLOAT16, tensor_parallel=2),
    "PP 2": replace(BFLOAT16, pipeline_parallel=2),
    "EP 2": replace(BFLOAT16, tensor_parallel=2, flags=("--ep-size", "2")),
    "EP 2, balanced": replace(BFLOAT16, tensor_parallel=2, flags=BALANCED),
}
# SGLang itself refuses to split a block of 128 rows.
TWO = [
    by_two(name, form) for name in ("TP 2", "PP 2", "EP 2") for form in FORMS if (name, form) != ("TP 2", "fp8-block")
]
TWO.append(pytest.param("EP 2, balanced", "fp8-channel", marks=pytest.mark.exhaustive))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    write(root)
    return root


@pytest.fixture(scope="module")
def served(checkpoints, warm):
    """What a start's engine answered, for each of its formats a result of each scenario, and its log."""

    @cache
    def start(name: str, *forms: str) -> tuple[dict[str, list[Result]], str]:
        config, root = STARTS[name], checkpoints / f"{name} {forms[0]}".replace(" ", "-")
        scenarios = (SCENARIO, DRAFT) if config.dtype == "float32" else (SCENARIO,)
        models = [str(checkpoints / form) for form in forms]
        with warm.forking(), started_engine("sglang", models[0], config, root) as engine:
            engine.ready(600)
            assert engine.serving(60)["modules"] == ["sglang_ext.model", "sglang_ext.mtp"]
            engine.call(
                "tests.workers.sglang_several:serve",
                600,
                models=models,
                scenarios=[asdict(scenario) for scenario in scenarios],
                directory=str(root),
            )
        results = {
            form: [Result.load(root / f"{n}.{i}.safetensors") for i in range(len(scenarios))]
            for n, form in enumerate(forms)
        }
        return results, (root / "log").read_text()

    return start


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_dequantized_in_float32(served, checkpoints, form):
    results, _ = served("float32", *ORDER)
    answered, drafted = results[form]
    check_conditions(SCENARIO, CONFIG, answered)
    directory = dequantized(checkpoints, form)
    difference, draft = compare(answered, Whole(directory), TOLERANCE), compare_draft(drafted, directory)
    print(f"{form}: {difference.max:.3g} at {difference.worst}; draft {draft.max:.3g} at {draft.worst}")
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
    assert not difference.wrong_tokens
    assert draft.max <= TOLERANCE, f"{draft.max:.3g} at {draft.worst}"


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_served_as_transformers_computes_it(served, checkpoints, record_property, form):
    results, log = served("one process", form)
    assert DEQUANTIZED not in log
    check(results[form], "one process", checkpoints, form)
    record_property("matrix", f"{form} | SGLang | one process, MTP | end to end on CPU, as stored")


@pytest.mark.parametrize(("name", "form"), TWO)
def test_a_quantized_checkpoint_is_served_by_two_processes(served, checkpoints, record_property, name, form):
    results, log = served(name, form)
    assert DEQUANTIZED not in log
    check(results[form], name, checkpoints, form)
    column, _, balanced = name.partition(",")
    how = "with MTP, also each expert twice" if balanced else "with MTP"
    record_property("matrix", f"{form} | SGLang | {column} | end to end on CPU, as stored, {how}")


def check(results, name, checkpoints, form):
    (answered,) = results
    check_conditions(SCENARIO, STARTS[name], answered)
    directory = dequantized(checkpoints, form)
    exact, rounded = Whole(directory), Whole(directory, torch.bfloat16)
    ours, theirs = compare(answered, exact), rounding(answered, exact, rounded)
    print(f"{name} {form}: {ours.max:.3g} at {ours.worst}; transformers {theirs.max:.3g}")
    assert ours.usual <= LOGPROB_QUANTIZED_RATIO * theirs.usual, f"{ours.max:.3g} at {ours.worst}"


@pytest.mark.exhaustive
def test_what_is_dequantized_is_named_in_one_line(served):
    _, log = served("float32", *ORDER)
    lines = {line.partition(DEQUANTIZED)[2] for line in log.splitlines() if DEQUANTIZED in line}
    for part in (
        "linear_attn.in_proj_qkvz",
        "mtp.layers.0.mlp.experts.{0..3}.up_proj",
        "mtp.layers.0.self_attn.q_proj",
    ):
        named = [line for line in lines if part in line]
        assert named and all(line.endswith("(the compiled products compute in bfloat16)") for line in named), named
    assert not any("mtp.fc" in line or "in_proj_ba" in line for line in lines)
