"""The checkpoints that engine tests serve: ``demo`` is the trained one, the others are random.

Keys are ``config.json`` keys that differ from the tiny preset.
"""

from pathlib import Path
from typing import Any

from qnext_plugin.checkpoint.make_demo import write_demo_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint

L, F = "linear_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}

# Small recurrent states, so that a cache block is 32 tokens and a prompt spans many.
_SMALL = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "max_position_embeddings": 1024}
_RATIO_1 = {"linear_num_key_heads": 3, "linear_num_value_heads": 3}
_RATIO_4 = {"linear_num_key_heads": 2, "linear_num_value_heads": 8}
_IRREGULAR = {"layer_types": [F, L, F, L, L, L, F, L]}
_MLP_ONLY = {"mlp_only_layers": [1, 2, 6]}
_EVERY_SECOND = {"decoder_sparse_step": 2}
_TIED = {"tie_word_embeddings": True}
_BIAS = {"attention_bias": True}
_UNNORMALIZED = {"norm_topk_prob": False}
_YARN = {"rope_scaling": YARN}

# Each unusual feature is in a different subset of a, b, c, d: which of them fail names the feature.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tiny": _SMALL,
    "odd-a": _SMALL | _IRREGULAR | _MLP_ONLY | _EVERY_SECOND | _YARN,
    "odd-b": _SMALL | _IRREGULAR | _TIED | _BIAS | _RATIO_1 | _YARN,
    "odd-c": _SMALL | _MLP_ONLY | _TIED | _UNNORMALIZED | _RATIO_4 | _YARN,
    "odd-d": _SMALL | _EVERY_SECOND | _BIAS | _UNNORMALIZED,
    # The dimensions that vLLM's C++ kernels take; the wide attention keeps blocks at 96 tokens.
    "bfloat16": {
        "max_position_embeddings": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
DIALECTS = {"odd-d": "transformers5", "odd-c": "transformers5"}


def write_checkpoint(directory: Path, name: str) -> Path:
    """Write the named checkpoint below ``directory`` and return where."""
    target = directory / name
    if name == "demo":
        write_demo_checkpoint(target)
        return target
    write_random_checkpoint(
        target,
        dtype="bfloat16" if name == "bfloat16" else "float32",
        seed=sorted(CHECKPOINTS).index(name),
        dialect=DIALECTS.get(name, "published"),
        overrides=CHECKPOINTS[name],
    )
    return target
