"""A layer's forward pass stays within a budget of operators that only move activations, on CPU in bfloat16, eager."""

import pytest

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import started_engine
from vllm_ext.cpu.gemm import packs

# By the convolution and the delta rule of prompts, as measured when they were last changed. Conversions count: a norm
# in eager mode makes two, to float32 and back.
BUDGETS = {
    "cpp, cpp": {
        "prefill": {"linear_attention": 19, "full_attention": 21},
        "decode": {"linear_attention": 19, "full_attention": 21},
    },
    "compiled, cpp": {
        "prefill": {"linear_attention": 18, "full_attention": 21},
        "decode": {"linear_attention": 18, "full_attention": 21},
    },
    "compiled, torch": {
        "prefill": {"linear_attention": 40, "full_attention": 22},
        "decode": {"linear_attention": 28, "full_attention": 22},
    },
}
# Modules too small for packing: as many rows as experts, as DeltaNet heads, one.
SMALL = ["gate", "in_proj_ba", "shared_expert_gate"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, checkpoint, warm):
    directory = tmp_path_factory.mktemp("operators") / "engine"
    config = EngineConfig(dtype="bfloat16")
    with warm.forking(), started_engine("vllm", str(checkpoint("bfloat16")), config, directory) as engine:
        engine.ready(400)
        found = engine.call("tests.workers.vllm_operators:count", 400)
        return found | {"serving": engine.serving(60)}


def test_layers_move_no_more_than_their_budget(found):
    print(found["moves"])
    (kernel,) = (name for name in found["serving"]["kernels"] if name.startswith("prefill: "))
    for phase, budget in BUDGETS[kernel.removeprefix("prefill: ")].items():
        for mixer, most in budget.items():
            assert 0 < found["moves"][phase][mixer] <= most, f"{phase}, {mixer}: {found['moves'][phase][mixer]}"


def test_weights_are_packed(found):
    methods = found["methods"]
    assert not packs() or methods["UnquantizedLinearMethod"] == SMALL
    ours = {"experts: packed", "experts: compiled"}.intersection(found["serving"]["kernels"])
    assert ("PackedHeadMethod" in methods, len(ours)) == (packs(), packs())


def test_router_does_not_round_its_logits(found):
    assert found["router"] == "torch.float32"
