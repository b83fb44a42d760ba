"""A layer's forward pass stays within a budget of operators that only move activations, on CPU in bfloat16, eager."""

import json

import pytest

from qnext_plugin import process

pytestmark = [pytest.mark.engine, pytest.mark.exhaustive]

# A norm converts to float32 and back. Each layer has two, attention another two over heads, the DeltaNet one more.
BUDGET = {
    "prefill": {"linear_attention": 9, "full_attention": 12},
    "decode": {"linear_attention": 9, "full_attention": 12},
}


def test_layers_move_no_more_than_their_budget(tmp_path, checkpoint):
    out, log = tmp_path / "out.json", tmp_path / "log"
    status = process.run(["-m", "tests.engines.vllm_operators", str(checkpoint("bfloat16")), str(out)], log)
    assert status == 0, process.tail(log)
    found = json.loads(out.read_text())
    assert found["serving"]["modules"] == ["vllm_ext.model"]
    print(found["moves"])
    for phase, budget in BUDGET.items():
        for mixer, most in budget.items():
            assert 0 < found["moves"][phase][mixer] <= most, f"{phase}, {mixer}: {found['moves'][phase][mixer]}"
