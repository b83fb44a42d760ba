"""What the tests of quantized checkpoints serve, on either engine."""

from pathlib import Path

from qnext_plugin.checkpoint.make_quantized import FORMATS, quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.verify.scenarios import Scenario, tokens
from tests.support.dequantized import write_dequantized

# Every expert is used: between two that tie, rounding decides in any implementation.
SIZES = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,  # vLLM wants both in each pipeline stage
    "hidden_size": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 1024,
}
SCENARIO = Scenario((tuple(tokens(length, seed=length) for length in (1, 7, 40, 130)),), drafts="cycle")


def write(root: Path) -> None:
    """A checkpoint in each format, by its name below ``root``."""
    write_random_checkpoint(root / "source", overrides=SIZES)
    for name in FORMATS:
        quantize_checkpoint(root / "source", root / name, format=name)


def dequantized(root: Path, form: str) -> Path:
    """The same values in float32, for `transformers`."""
    directory = root / f"{form}-dequantized"
    return directory if directory.exists() else write_dequantized(root / form, directory)
