"""Make complete checkpoints with random weights, to test and measure a server without downloading a model."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Shape, describe
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import KEYS, QNextConfig

DIALECTS = ("published", "transformers5")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = 5_000_000_000

Tensors = Mapping[str, torch.Tensor]
"""Tensors by the names under which a checkpoint stores them."""

# Model configurations in the published dialect. The tiny one has only sizes that CPU kernels accept.
_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10_000_000,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _COMMON
    | {
        "head_dim": 32,
        "hidden_size": 96,
        "intermediate_size": 160,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "shared_expert_intermediate_size": 32,
        "vocab_size": 320,
    },
    "80b": _COMMON
    | {
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 151936,
    },
}

_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP_TOKENS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>"),
    *("<tool_response>", "</tool_response>"),
)
_ENDOFTEXT, _IM_END = 256, 258  # the 256 bytes come first


def write_random_checkpoint(
    directory: str | Path,
    *,
    preset: str = "tiny",
    dtype: str = "bfloat16",
    seed: int = 0,
    dialect: str = "published",
    overrides: Mapping[str, Any] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    format: str | None = None,
    group_size: int = 32,
) -> None:
    """Write a checkpoint with a byte-level tokenizer and a chat template to an empty or new directory.

    ``overrides`` replaces keys of ``config.json`` (None removes a key). ``max_shard_size`` is in bytes; a larger weight
    gets a separate shard. A weight depends only on ``seed`` and the tensor's name. With ``format``, a key of
    ``quantizers.FORMATS``, the tensors are those that ``quantize_checkpoint`` would write from this checkpoint. One
    weight is in memory at a time. Raises ``ValueError`` before anything is written if an argument is unknown, the
    configuration is invalid, the directory is not empty or the disk is too small.
    """
    for name, value, known in (("preset", preset, PRESETS), ("dtype", dtype, DTYPES), ("dialect", dialect, DIALECTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {list(known)}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected at least 1 byte")
    raw = _raw_config(preset, dtype, dialect, overrides or {})
    shapes, torch_dtype = expected_tensors(QNextConfig.from_dict(raw)), DTYPES[dtype]
    quantization = None
    if format is not None:
        from qnext_plugin.checkpoint.make_quantized import Quantization  # imports compressed-tensors

        quantization = Quantization(shapes, format, group_size)
        raw["quantization_config"] = quantization.config()

    def stored(name: str) -> Tensors:
        """Make a weight, and return the tensors that store it by name."""
        weight = random_tensor(name, shapes[name], seed, raw["tie_word_embeddings"]).to(torch_dtype)
        return {name: weight} if quantization is None else quantization.stored(name, weight)

    layout: dict[str, Tensors] = {
        name: {name: torch.empty(shape, dtype=torch_dtype, device="meta")} for name, shape in shapes.items()
    }
    if quantization is not None:
        layout |= quantization.layout(torch_dtype)
    directory = Path(directory).absolute()
    check_target(directory, sum(map(_nbytes, layout.values())))

    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(directory, list(_shards(layout, max_shard_size)), stored)
    _write_tokenizer(directory, raw["max_position_embeddings"])
    _write_json(
        directory / "generation_config.json", {"eos_token_id": [_IM_END, _ENDOFTEXT], "pad_token_id": _ENDOFTEXT}
    )
    _write_json(directory / "config.json", raw)  # last, so that an unfinished directory does not look like a model


def random_tensor(name: str, shape: Shape, seed: int, tied: bool = False) -> torch.Tensor:
    """Return a random float32 weight, scaled so that projections have variance near 1 and logits a deviation near 3.

    Embeddings start the residual stream at variance 1, and each layer adds a fraction of that. This is enough to
    matter, yet rounding errors do not grow until the answer changes. If ``tied``, the embedding is also the head, so
    the last norm scales and flips signs; otherwise every token would predict itself. The DeltaNet decay is
    ``exp(-A * softplus(a + dt_bias))`` with A uniform in [0.1, 16] and the step log-uniform in [0.001, 0.03], which is
    the scheme of Mamba 2 (arXiv:2405.21060) with smaller steps.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    module, leaf = name.split(".")[-2:]
    if leaf == "A_log":
        return torch.empty(shape).uniform_(0.1, 16, generator=generator).log_()
    if leaf == "dt_bias":
        step = torch.empty(shape).uniform_(math.log(0.001), math.log(0.03), generator=generator).exp_()
        return step.expm1().log()  # inverse of softplus
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:  # norms and biases are around 0, except the weight of the gated norm, which is around 1
        if tied and name in ("model.norm.weight", "mtp.norm.weight"):
            return noise.sign().add_(noise, alpha=0.1).mul_(3.0 * shape[0] ** -0.5).sub_(1.0)
        return noise.mul_(0.1).add_(1.0 if name.endswith(".linear_attn.norm.weight") else 0.0)
    if module == "embed_tokens":
        return noise
    if module in ("o_proj", "out_proj", "down_proj"):
        gain = 1.5 * shape[0] ** -0.5
    else:
        gain = {"lm_head": 3.0, "gate": 2.0}.get(module, 1.0)  # `gate` routes to the experts
    return noise.mul_(gain * shape[-1] ** -0.5)


def _raw_config(preset: str, dtype: str, dialect: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    base = PRESETS[preset] | {"bos_token_id": _ENDOFTEXT, "eos_token_id": _IM_END}
    known = {*base, *KEYS}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"config.json has no key {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    raw = {k: v for k, v in (base | dict(overrides)).items() if v is not None or k not in overrides}
    config = QNextConfig.from_dict(raw)
    num_tokens = 256 + len(_CONTROL_TOKENS) + len(_MARKUP_TOKENS)
    if config.vocab_size < num_tokens:
        raise ValueError(f"vocab_size is {config.vocab_size}, expected at least the tokenizer's {num_tokens}")
    if dialect == "published":
        return raw | {"torch_dtype": dtype}
    for name in ("rope_theta", "rope_scaling", "full_attention_interval"):
        raw.pop(name, None)
    rope = dict(config.rope_parameters)
    return raw | {"layer_types": list(config.layer_types), "rope_parameters": rope, "dtype": dtype}


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _shards(layout: Mapping[str, Tensors], max_bytes: int) -> Iterator[dict[str, Tensors]]:
    """Yield the weights of each file; ``layout`` has the tensors that store a weight, without data."""
    shard: dict[str, Tensors] = {}
    size = 0
    for name, tensors in layout.items():
        if shard and size + _nbytes(tensors) > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensors
        size += _nbytes(tensors)
    yield shard


def check_target(directory: Path, nbytes: int) -> None:
    """Raise ``ValueError`` unless ``directory`` is empty or new and ``nbytes`` bytes fit on its disk."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    if not existing.is_dir() or (existing == directory and any(directory.iterdir())):
        raise ValueError(f"{existing}: expected an empty or new directory; choose another or delete it")
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise ValueError(
            f"{directory}: the weights need {nbytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
            "lower num_hidden_layers or num_experts, or choose another disk"
        )


def _write_weights(directory: Path, shards: list[dict[str, Tensors]], stored: Callable[[str], Tensors]) -> None:
    weight_map: dict[str, str] = {}
    total = sum(_nbytes(tensors) for shard in shards for tensors in shard.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights", disable=None) as progress:
        for i, shard in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            header, offsets = _safetensors_header({k: t for tensors in shard.values() for k, t in tensors.items()})
            weight_map |= dict.fromkeys(offsets, file)
            with (directory / file).open("wb") as f:
                f.write(header)
                for name in shard:
                    for key, tensor in stored(name).items():
                        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                        f.seek(len(header) + offsets[key])
                        f.write(data.data)
                        progress.update(data.nbytes)
    if len(shards) > 1:
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _safetensors_header(tensors: Tensors) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file with such tensors, and where after the header the data of each begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider elements come first, so that each tensor begins at a multiple of its element's size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        info, end = describe(tensor), offset + tensor.nbytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns the data to 8 bytes
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name in tensors}
    return len(raw).to_bytes(8, "little") + raw, offsets


def _write_tokenizer(directory: Path, model_max_length: int) -> None:
    """Write a byte-level BPE without merges: every byte is a token; ids 0..255 follow the order of their characters."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _MARKUP_TOKENS])
    assert (tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")) == (_ENDOFTEXT, _IM_END)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": (Path(__file__).parent.parent / "data" / "chat_template.jinja").read_text(),
    }
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
