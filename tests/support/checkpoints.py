"""The checkpoints that engine tests serve: ``demo`` and ``coder`` are the trained one, the others are random.

Keys are ``config.json`` keys that differ from the tiny preset.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_demo import write_demo_checkpoint
from qnext_plugin.checkpoint.make_random import random_tensor, write_random_checkpoint
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig
from tests.support.coder import write_coder_checkpoint

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
    # As if the trunk's experts were pruned and the draft's not; no rank holds as many ids as another.
    "wide-draft": _SMALL | {"vocab_size": 331, "num_nextn_predict_layers": 0},
    "without-draft": _SMALL | {"num_nextn_predict_layers": 0},
    # For Triton's interpreter, which runs the programs of a kernel one after another.
    "xs": _SMALL | {"num_hidden_layers": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2},
}
WIDE = 13  # experts of that draft; the trunk's layers have eight
NULLS = {"mlp_only_layers": None, "pad_token_id": None, "eos_token_id": [258, 256]}
DIALECTS = {"odd-d": "transformers5", "odd-c": "transformers5"}


def write_checkpoint(directory: Path, name: str) -> Path:
    """Write the named checkpoint below ``directory`` and return where."""
    target = directory / name
    if name == "demo":
        write_demo_checkpoint(target)
        return target
    if name == "coder":
        write_coder_checkpoint(target)
        return target
    write_random_checkpoint(
        target,
        dtype="bfloat16" if name == "bfloat16" else "float32",
        seed=sorted(CHECKPOINTS).index(name),
        dialect=DIALECTS.get(name, "published"),
        overrides=CHECKPOINTS[name],
    )
    if name == "odd-b":
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | NULLS))
    if name == "wide-draft":
        widen_draft(target)
    if name == "without-draft":
        drop_draft(target)
    return target


def drop_draft(directory: Path) -> None:
    """Leave a checkpoint without a draft, as most of Qwen3-Coder-Next are."""
    file = directory / "model.safetensors"
    trunk = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("mtp.")}
    save_file(trunk, file, metadata={"format": "pt"})


def widen_draft(directory: Path) -> None:
    """Give the draft of a checkpoint more experts than config.json says; its other tensors stay."""
    file = directory / "model.safetensors"
    wide = expected_tensors(replace(QNextConfig.from_pretrained(directory), mtp_num_experts=WIDE))
    tensors = load_file(file)
    for name, shape in wide.items():
        if name not in tensors or tensors[name].shape != shape:
            tensors[name] = random_tensor(name, shape, seed=0)
    save_file(tensors, file, metadata={"format": "pt"})
