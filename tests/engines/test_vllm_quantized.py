"""Quantized checkpoints served by vLLM, with MTP, against `transformers` with the same dequantized weights.

The bound is in terms of what `transformers` itself loses in bfloat16 and with the inputs of the same layers rounded to
the activations' format: a wrong weight, scale or zero point is off by far more.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from vllm._custom_ops import cpu_has_amx_fp8

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.merged import layer_of
from qnext_plugin.checkpoint.quantization import is_quantized, stored_modules
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.ops.instructions import multiplies_codes
from qnext_plugin.verify.comparison import check_conditions, compare, rounding
from qnext_plugin.verify.reference import Whole
from tests.support.quantized import FORMS, SCENARIO, dequantized, write
from tests.support.several import case, serve
from tests.support.tolerances import LOGPROB_QUANTIZED_RATIO

ALONE = EngineConfig(dtype="bfloat16", draft_tokens=2, num_blocks=64)
PARALLEL = {
    "TP 2": replace(ALONE, tensor_parallel=2),
    "EP 2": replace(ALONE, tensor_parallel=2, expert_parallel=True),
    "PP 2": replace(ALONE, pipeline_parallel=2),
}
# Layers that vLLM's CPU kernels serve as stored, on a CPU without AMX; the experts of none are among them.
PROJECTIONS = {"in_proj_qkvz", "out_proj", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
AS_STORED = {
    "w8a8": PROJECTIONS,
    "w4a16": PROJECTIONS,
    "awq": PROJECTIONS,
    "gptq": PROJECTIONS,
}
FP8_BY_ROW = {"fp8-channel", "two-groups"}  # vLLM has a product for CPUs with AMX-FP8 alone
INT8_INPUTS = {"w8a8"}  # what vLLM's kernels for these round their inputs to
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    write(root)
    return root


@pytest.fixture(scope="module")
def served(checkpoints, warm):
    """What an engine of each format answered, one after the other in one process."""

    @cache
    def start(name):
        config, root = PARALLEL.get(name, ALONE), checkpoints / name.replace(" ", "-")
        root.mkdir()
        with nullcontext() if name in PARALLEL else warm.forking():
            return serve(root, {form: case(checkpoints / form, config, (SCENARIO,)) for form in FORMS}, timeout=900)

    return start


def round_input(module, args):
    """A hook that rounds a layer's input as a kernel with int8 inputs does, one scale for each token."""
    x = args[0].float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (((x / scale).round() * scale).to(args[0].dtype), *args[1:])


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_served_as_transformers_computes_it(served, checkpoints, record_property, form):
    check(served("one process")[form], checkpoints, form)
    how = "as stored: all but the experts" if AS_STORED.get(form) else "dequantized while loading"
    how = "as stored" if multiplies_codes() else how
    record_property("matrix", f"{form} | vLLM | one process, MTP | end to end on CPU, {how}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PARALLEL)
def test_a_quantized_checkpoint_is_served_by_two_processes(served, checkpoints, record_property, name, form):
    check(served(name)[form], checkpoints, form)
    record_property("matrix", f"{form} | vLLM | {name} | end to end on CPU, with MTP")


def check(served, checkpoints, form):
    assert "error" not in served, served["error"]
    assert served["modules"] == ["vllm_ext.model", "vllm_ext.mtp"]
    as_stored, plain, codes = (served["layers"][how] for how in ("as stored", "dequantized", "codes"))
    if multiplies_codes():
        modules = stored_modules(read_headers(checkpoints / form))
        assert codes.keys() == {layer_of(name) for name, leaves in modules.items() if is_quantized(leaves)}, plain
        assert not as_stored and not plain
    elif not torch.cpu._is_amx_tile_supported() or (form in FP8_BY_ROW and not cpu_has_amx_fp8()):
        assert {layer.rpartition(".")[2] for layer in as_stored} == AS_STORED.get(form, set()), plain
    result = served["results"][0]
    check_conditions(SCENARIO, ALONE, result)

    directory = dequantized(checkpoints, form)
    exact, rounded = Whole(directory), Whole(directory, torch.bfloat16)
    ours = compare(result, exact)
    with ExitStack() as hooks:
        for layer in as_stored if form in INT8_INPUTS else ():
            outer, _, last = layer.rpartition(".")
            if layer.startswith("model."):
                for part in PARTS.get(last, (last,)):
                    module = rounded.model.get_submodule(f"{outer}.{part}")
                    hooks.callback(module.register_forward_pre_hook(round_input).remove)
        theirs = rounding(result, exact, rounded)
    print(f"{form}: {ours.max:.3g} at {ours.worst}; transformers {theirs.max:.3g}; as stored {len(as_stored)}")
    assert ours.usual <= LOGPROB_QUANTIZED_RATIO * theirs.usual, f"{ours.max:.3g} at {ours.worst}"
