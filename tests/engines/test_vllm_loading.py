"""Every rank of tensor-parallel groups of up to eight holds its part of the checkpoint; a reload changes all of it."""

import pytest

from qnext_plugin import process
from qnext_plugin.random_checkpoint import write_random_checkpoint
from tests.engines.checkpoints import CHECKPOINTS

pytestmark = pytest.mark.engine

WIDE = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 24,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def test_each_rank_holds_its_shard(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", dtype="float32", overrides=WIDE)
    log = tmp_path / "log"
    status = process.run(["-m", "tests.engines.vllm_loading", str(tmp_path / "checkpoint")], log)
    assert status == 0, process.tail(log)
    assert log.read_text().count("loaded as expected") == 1 + 2 + 4 + 8


def test_what_is_derived_from_weights_follows_them(tmp_path, checkpoint):
    """Packed experts, convolutions and linears, and a tied head."""
    names, pairs, log = ("tiny", "odd-b", "bfloat16"), [], tmp_path / "log"
    for name in names:
        dtype = "bfloat16" if name == "bfloat16" else "float32"
        write_random_checkpoint(tmp_path / name, dtype=dtype, seed=7, overrides=CHECKPOINTS[name])
        pairs += [str(checkpoint(name)), str(tmp_path / name)]
    assert process.run(["-m", "tests.engines.vllm_modules", *pairs], log) == 0, process.tail(log)
    assert log.read_text().count("loaded again as expected") == len(names)
