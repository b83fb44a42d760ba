"""Compute the memory of a model's weights, keys and values, and states on one tensor-parallel rank, in bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.schema import FLOAT_DTYPES, QUANT_COMPANIONS, expected_tensors
from qnext_plugin.config import FULL, LINEAR, QNextConfig
from qnext_plugin.plan.state import StateSpec

VOCAB_PADDING = 64  # both engines pad the vocabulary to a multiple of it before they split it
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}  # all other formats have 8
_REPLICATED = {"norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "gate", "shared_expert_gate"}
_REPLICATED |= {"pre_fc_norm_hidden", "pre_fc_norm_embedding"}


@dataclass(frozen=True)
class Serving:
    """A model and the way to serve it. ``num_draft_tokens`` is 0 without MTP."""

    config: QNextConfig
    tp_size: int = 1
    num_draft_tokens: int = 0
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.config.check_tensor_parallel(self.tp_size)
        if FULL not in self.config.layer_types:
            raise ValueError(f"config.json: layer_types has no {FULL!r}, and neither engine sizes a cache without one")

    @property
    def num_full_attention_layers(self) -> int:
        """The number of layers with a key-value cache, the draft's included."""
        draft = self.config.num_nextn_predict_layers if self.num_draft_tokens else 0
        return self.config.layer_types.count(FULL) + draft

    @property
    def num_gdn_layers(self) -> int:
        return self.config.layer_types.count(LINEAR)

    @property
    def kv_bytes_per_layer(self) -> int:
        """The bytes of one token in one full-attention layer; a rank holds at least one key-value head."""
        heads = max(1, self.config.num_key_value_heads // self.tp_size)
        return 2 * heads * self.config.head_dim * (self.kv_cache_dtype or self.dtype).itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_bytes_per_layer * self.num_full_attention_layers

    def state(self, conv_dtype: torch.dtype, recurrent_dtype: torch.dtype, num_draft_tokens: int = 0) -> StateSpec:
        """Return the state of one sequence in one Gated DeltaNet layer."""
        return StateSpec(self.config.gdn.shard(self.tp_size), conv_dtype, recurrent_dtype, num_draft_tokens)

    def tensors(self, headers: Mapping[str, TensorInfo] | None = None) -> Iterator[tuple[str, float]]:
        """Yield the name and bytes of each weight; a quantized checkpoint's are known only from its ``headers``."""
        bits = self.dtype.itemsize * 8
        if headers is None:
            for name, shape in expected_tensors(self.config, mtp=self.num_draft_tokens > 0).items():
                yield name, self._rank_elements(name, shape) * bits / 8
            return
        for name, info in headers.items():
            if self.num_draft_tokens or name.split(".")[0] != "mtp":
                # Of floating-point tensors all but scales are converted.
                is_scale = name.rpartition(".")[2] in QUANT_COMPANIONS
                width = bits if info.dtype in FLOAT_DTYPES and not is_scale else _BITS.get(info.dtype, 8)
                yield name, self._rank_elements(name, info.shape) * width / 8

    def weights(self, headers: Mapping[str, TensorInfo] | None = None) -> dict[str, int]:
        """Return the bytes of each kind of weight."""
        sizes: dict[str, float] = {}
        for name, size in self.tensors(headers):
            sizes[_kind(name)] = sizes.get(_kind(name), 0) + size
        return {kind: math.ceil(size) for kind, size in sizes.items()}

    def _rank_elements(self, name: str, shape: tuple[int, ...]) -> float:
        elements, parts = math.prod(shape), name.split(".")
        if parts[-2] in ("embed_tokens", "lm_head"):
            rows = math.ceil(shape[0] / VOCAB_PADDING) * VOCAB_PADDING
            return elements / shape[0] * rows / self.tp_size
        if "experts" not in parts and parts[-2] in _REPLICATED:
            return elements
        if parts[-2] in ("k_proj", "v_proj"):
            heads = self.config.num_key_value_heads
            return elements / heads * max(1, heads // self.tp_size)
        return elements / self.tp_size


def _kind(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "mtp":
        return "MTP draft"
    if {"embed_tokens", "lm_head"} & {*parts}:
        return "embedding and head"
    if "linear_attn" in parts:
        return "Gated DeltaNet"
    if "self_attn" in parts:
        return "gated attention"
    if "experts" in parts:
        return "experts"
    if "shared_expert" in parts:
        return "shared experts"
    return "dense MLPs" if {"gate_proj", "up_proj", "down_proj"} & {*parts} else "routers and norms"
