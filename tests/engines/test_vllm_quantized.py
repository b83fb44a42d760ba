"""Quantized checkpoints served by vLLM, with MTP, against `transformers` with the same dequantized weights.

The bound is in terms of what `transformers` itself loses in bfloat16: a wrong weight, scale or zero point is off by far
more.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.merged import layer_of
from qnext_plugin.checkpoint.quantization import is_quantized, stored_modules
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import check_conditions, compare, rounding
from qnext_plugin.verify.reference import Whole
from tests.support.quantized import BY_TWO, FORMS, SCENARIO, by_two, dequantized, write
from tests.support.several import case, serve
from tests.support.tolerances import LOGPROB_QUANTIZED_RATIO

ALONE = EngineConfig(dtype="bfloat16", draft_tokens=2, num_blocks=64)
PARALLEL = {
    "TP 2": replace(ALONE, tensor_parallel=2),
    "EP 2": replace(ALONE, tensor_parallel=2, expert_parallel=True),
    "PP 2": replace(ALONE, pipeline_parallel=2),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    write(root)
    return root


@pytest.fixture(scope="module")
def served(checkpoints, warm):
    """What an engine of each format answered, one after the other."""

    @cache
    def start(name, *forms):
        config, root = PARALLEL.get(name, ALONE), checkpoints / f"{name} {forms[0]}".replace(" ", "-")
        root.mkdir()
        with warm.forking():
            return serve(root, {form: case(checkpoints / form, config, (SCENARIO,)) for form in forms}, timeout=900)

    return start


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_served_as_transformers_computes_it(served, checkpoints, record_property, form):
    check(served("one process", *FORMS)[form], checkpoints, form)
    record_property("matrix", f"{form} | vLLM | one process, MTP | end to end on CPU, as stored")


@pytest.mark.parametrize("form", [by_two(form) for form in FORMS])
@pytest.mark.parametrize("name", PARALLEL)
def test_a_quantized_checkpoint_is_served_by_two_processes(served, checkpoints, record_property, name, form):
    forms = [other for other in FORMS if (other in BY_TWO) == (form in BY_TWO)]
    check(served(name, *forms)[form], checkpoints, form)
    record_property("matrix", f"{form} | vLLM | {name} | end to end on CPU, as stored, with MTP")


def check(served, checkpoints, form):
    assert "error" not in served, served["error"]
    assert served["modules"] == ["vllm_ext.model", "vllm_ext.mtp"]
    as_stored, plain, codes = (served["layers"][how] for how in ("as stored", "dequantized", "codes"))
    modules = stored_modules(read_headers(checkpoints / form))
    assert codes.keys() == {layer_of(name) for name, leaves in modules.items() if is_quantized(leaves)}, plain
    assert not as_stored and not plain
    result = served["results"][0]
    check_conditions(SCENARIO, ALONE, result)

    directory = dequantized(checkpoints, form)
    exact, rounded = Whole(directory), Whole(directory, torch.bfloat16)
    ours = compare(result, exact)
    theirs = rounding(result, exact, rounded)
    print(f"{form}: {ours.max:.3g} at {ours.worst}; transformers {theirs.max:.3g}")
    assert ours.usual <= LOGPROB_QUANTIZED_RATIO * theirs.usual, f"{ours.max:.3g} at {ours.worst}"
