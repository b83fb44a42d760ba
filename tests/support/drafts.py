"""Small drafts with random weights, for checkpoints that have none of their own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qnext_plugin.checkpoint.make_random import random_tensor
from qnext_plugin.config import QNextConfig

LAYER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)


def config_of(target: Path, architecture: str, layers: int, **more: Any) -> dict[str, Any]:
    """``config.json`` of a Llama of the ``target``'s vocabulary, hidden size and heads."""
    config = QNextConfig.from_pretrained(target)
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **more,
    }


def write(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], **more: torch.Tensor) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.ones(shape) if "norm" in name else random_tensor(name, shape, seed=3)
        for name, shape in shapes.items()
    }
    save_file(tensors | more, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def layer(prefix: str, config: dict[str, Any], inputs: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder layer, whose attention reads ``inputs`` numbers of a token."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = (
        *((queries, inputs), (keys, inputs), (keys, inputs), (hidden, queries)),
        *((inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)),
    )
    return {f"{prefix}.{name}.weight": shape for name, shape in zip(LAYER, shapes, strict=True)}


def write_llama(directory: Path, target: Path) -> Path:
    """Write a model of two layers that can draft for ``target``."""
    config = config_of(target, "LlamaForCausalLM", 2)
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(2):
        shapes |= layer(f"model.layers.{i}", config, hidden)
    return write(directory, config, shapes)


def write_eagle3(directory: Path, target: Path) -> Path:
    """Write an EAGLE3 head for ``target``, which drafts every second token id only."""
    config = config_of(target, "LlamaForCausalLMEagle3", 1)
    vocab, hidden = config["vocab_size"] // 2, config["hidden_size"]
    config["draft_vocab_size"] = vocab
    shapes = {"fc.weight": (hidden, 3 * hidden), "norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    shapes |= layer("midlayer", config, 2 * hidden) | {"midlayer.hidden_norm.weight": (hidden,)}
    return write(directory, config, shapes, d2t=torch.arange(vocab))


def write_dflash(directory: Path, target: Path) -> Path:
    """Write a DFlash head for ``target``, which shares its embedding and head."""
    read = (1, 4, 6)  # the layers after which it reads hidden states
    config = config_of(target, "DFlashDraftModel", 1, model_type="qwen3")
    config["dflash_config"] = {"mask_token_id": 3, "target_layer_ids": list(read)}
    hidden, head = config["hidden_size"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(read) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "layers.0.self_attn.q_norm.weight": (head,),
        "layers.0.self_attn.k_norm.weight": (head,),
    }
    return write(directory, config, shapes | layer("layers.0", config, hidden))


_WRITE = {"draft_model": write_llama, "eagle3": write_eagle3, "dflash": write_dflash}
_MORE = {"ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 3}}


def vllm_flags(method: str, num_tokens: int, target: Path) -> tuple[str, ...]:
    """vLLM's flags for drafts by ``method``; a model that drafts is written beside ``target`` on first use."""
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": num_tokens, **_MORE.get(method, {})}
    if method in _WRITE:
        config["model"] = draft_of(method, target)
    return ("--speculative-config", json.dumps(config))


def draft_of(method: str, target: Path) -> str:
    """Where a model that drafts for ``target`` lies: beside it, where it is written on first use."""
    draft = target.with_name(f"{target.name}-{method}")
    return str(draft if draft.exists() else _WRITE[method](draft, target))


_ALGORITHMS = {"ngram": "NGRAM", "draft_model": "STANDALONE", "eagle3": "EAGLE3", "dflash": "DFLASH"}


def sglang_flags(method: str, num_tokens: int, target: Path) -> tuple[str, ...]:
    """SGLang's flags for drafts by ``method`` in its place of ``num_tokens``; of n-grams for two paths of as many."""
    flags = ("--speculative-algorithm", _ALGORITHMS[method])
    if method == "ngram":
        return (*flags, "--speculative-num-draft-tokens", str(1 + 2 * num_tokens))
    return (*flags, "--speculative-draft-model-path", draft_of(method, target))


FLAGS = {"vllm": vllm_flags, "sglang": sglang_flags}
