"""Every rank of tensor-parallel groups of up to eight holds its part of the checkpoint, plain or quantised."""

import json

import pytest

from qnext_plugin.quantize import FORMATS, IGNORE, quantize_checkpoint
from qnext_plugin.random_checkpoint import write_random_checkpoint

pytestmark = pytest.mark.engine

# Each FP8 block, packed word and group fits a rank of 8, but the shared expert's blocks, as in the 80B.
WIDE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_size": 256,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 512,
}
# Quantised where the published ones are not, and the other way round.
MIXED = r".*\.(shared_expert_gate|k_proj)|model\.embed_tokens|lm_head|mtp\..*\.experts\..*"
SPARE = {"linear_num_value_heads": 24, "linear_key_head_dim": 16, "linear_value_head_dim": 8}


def make(root, formats=FORMATS):
    write_random_checkpoint(root / "plain", dtype="float32", overrides=WIDE | SPARE | {"moe_intermediate_size": 64})
    write_random_checkpoint(root / "source" / "wide", overrides=WIDE)
    for name in formats:
        quantize_checkpoint(root / "source" / "wide", root / name, format=name, ignore=IGNORE)
        quantize_checkpoint(root / "source" / "wide", root / f"{name}-mixed", format=name, ignore=MIXED)
        file = root / f"{name}-mixed" / "config.json"
        raw = json.loads(file.read_text())
        for key in ("ignore", "modules_to_not_convert"):
            if key in raw["quantization_config"]:
                raw["quantization_config"][key] = ["model.layers.0.self_attn", "re:nothing.like.this"]
        raw["quantization_config"].pop("dynamic", None)
        file.write_text(json.dumps(raw))
