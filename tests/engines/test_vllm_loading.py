"""Every rank of tensor-parallel groups of up to eight holds its part of the checkpoint."""

import pytest

from qnext_plugin import process
from qnext_plugin.random_checkpoint import write_random_checkpoint

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
