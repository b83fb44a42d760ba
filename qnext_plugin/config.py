"""The dimensions of a Qwen3-Next model, read from any published config.json and validated once."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

LINEAR = "linear_attention"
FULL = "full_attention"
ROPE_TYPES = ("default", "yarn")
LARGEST = 2**24  # above any real size; keeps a corrupt file from making us build an endless list of layers


@dataclass(frozen=True)
class GatedDeltaNetDims:
    """The head layout of a Gated DeltaNet mixer. One *group* is a key head and the value heads that share it."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int = 4

    @property
    def heads_per_group(self) -> int:
        return self.num_v_heads // self.num_k_heads

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        """The number of channels of the causal convolution: ``[q | k | v]``."""
        return 2 * self.key_dim + self.value_dim

    def shard(self, tp_size: int) -> "GatedDeltaNetDims":
        """Return the dimensions that one of ``tp_size`` tensor-parallel ranks holds; a rank holds whole groups."""
        if tp_size < 1 or self.num_k_heads % tp_size:
            divisors = [n for n in range(1, self.num_k_heads + 1) if self.num_k_heads % n == 0]
            raise ValueError(
                f"tensor parallel size {tp_size} does not divide linear_num_key_heads {self.num_k_heads}; "
                f"choose one of {divisors}"
            )
        return GatedDeltaNetDims(
            self.num_k_heads // tp_size,
            self.num_v_heads // tp_size,
            self.head_k_dim,
            self.head_v_dim,
            self.conv_kernel_size,
        )


@dataclass(frozen=True)
class QNextConfig:
    """A validated Qwen3-Next configuration. The fields have the names of ``config.json``.

    Both dialects are accepted: the published one (``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``,
    ``full_attention_interval``) and the one that ``transformers`` 5 writes (``rope_parameters``, ``layer_types``).
    ``rope_parameters`` is always complete here: it has ``rope_type``, ``rope_theta``, ``partial_rotary_factor`` and,
    for YaRN, the keys of YaRN, ``original_max_position_embeddings`` included.

    ``mtp_num_experts`` is no key of ``config.json``: it is the draft's own number of experts as its router has it, or
    None as long as that is not known. A checkpoint whose experts are pruned may have a draft of full width.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    layer_types: tuple[str, ...]
    rope_parameters: Mapping[str, Any]
    head_dim: int = 256
    linear_conv_kernel_dim: int = 4
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    intermediate_size: int = 5632
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    num_nextn_predict_layers: int = 1
    mtp_num_experts: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from a parsed ``config.json``; a ``ValueError`` names every missing or inconsistent key."""
        model_type = raw.get("model_type", "qwen3_next")
        if model_type not in ("qwen3_next", "qwen3_next_mtp"):
            raise ValueError(f"config.json: model_type is {model_type!r}, expected 'qwen3_next'")
        values = {name: raw[name] for name in KEYS if raw.get(name) is not None}
        if values.get("num_nextn_predict_layers") == 0:
            # It denies a draft, but only the tensors tell: some checkpoints have one all the same.
            del values["num_nextn_predict_layers"]
        _check_experts_per_layer(raw, values.get("num_experts", cls.num_experts))
        for name in ("layer_types", "mlp_only_layers"):
            if not isinstance(values.get(name, ()), list | tuple):
                raise ValueError(f"config.json: {name} is {values[name]!r}, expected a list")
        values["rope_parameters"] = _rope_parameters(
            raw, values.get("max_position_embeddings", cls.max_position_embeddings)
        )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        if "layer_types" not in values:
            interval = raw.get("full_attention_interval", 4)
            for name, value in (
                ("full_attention_interval", interval),
                ("num_hidden_layers", values["num_hidden_layers"]),
            ):
                if not _is_size(value):
                    raise ValueError(f"config.json: {_not_a_size(name, value)}")
            values["layer_types"] = [LINEAR if (i + 1) % interval else FULL for i in range(values["num_hidden_layers"])]
        values["layer_types"] = tuple(values["layer_types"])
        values["mlp_only_layers"] = tuple(values.get("mlp_only_layers", ()))
        return cls(**values)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read ``config.json`` in a local checkpoint directory."""
        return cls.from_dict(read_config(Path(path) / "config.json"))

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))

    @property
    def draft(self) -> Self:
        """The configuration of the draft's layers: the same one with the draft's own number of experts."""
        return self if self.mtp_num_experts is None else replace(self, num_experts=self.mtp_num_experts)

    @property
    def gdn(self) -> GatedDeltaNetDims:
        return GatedDeltaNetDims(
            self.linear_num_key_heads,
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
            self.linear_conv_kernel_dim,
        )

    @property
    def rotary_dim(self) -> int:
        """The number of leading dimensions of each attention head that RoPE rotates."""
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ``ValueError`` if a tensor-parallel size does not split the heads."""
        self.gdn.shard(tp_size)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % tp_size or max(kv_heads, tp_size) % min(kv_heads, tp_size):
            raise ValueError(
                f"tensor parallel size {tp_size} cannot split num_attention_heads {heads} with "
                f"num_key_value_heads {kv_heads}; it must divide the first and divide, or be a multiple of, the second"
            )

    def is_sparse(self, layer_idx: int) -> bool:
        """Return whether the layer's feed-forward part is a mixture of experts; otherwise it is a dense MLP."""
        return (
            layer_idx not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer_idx + 1) % self.decoder_sparse_step == 0
        )

    def _problems(self) -> Any:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not _is_size(value):
                yield _not_a_size(name, value)
                return
        for name in ("attention_bias", "tie_word_embeddings", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} is {getattr(self, name)!r}, expected true or false"
        if not _is_positive(self.rms_norm_eps):
            yield f"rms_norm_eps is {self.rms_norm_eps!r}, expected a positive number"
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            yield (
                f"linear_num_value_heads {self.linear_num_value_heads} is not a multiple of "
                f"linear_num_key_heads {self.linear_num_key_heads}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            yield f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}"
        unknown = sorted({repr(t) for t in self.layer_types if t not in (LINEAR, FULL)})
        if unknown:
            yield f"layer_types holds {', '.join(unknown)}, expected {LINEAR!r} or {FULL!r}"
        if not all(type(i) is int and 0 <= i < self.num_hidden_layers for i in self.mlp_only_layers):
            yield f"mlp_only_layers {list(self.mlp_only_layers)} is outside 0..{self.num_hidden_layers - 1}"
        if type(self.num_experts) is not int or not 0 <= self.num_experts <= LARGEST:
            yield f"num_experts is {self.num_experts!r}, expected an integer from 0 to {LARGEST}"
        elif self.num_experts and self.num_experts_per_tok > self.num_experts:
            yield f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
        if self.mtp_num_experts is not None and not self.num_experts_per_tok <= self.mtp_num_experts <= LARGEST:
            yield (
                f"num_experts_per_tok {self.num_experts_per_tok} does not fit the {self.mtp_num_experts} experts of "
                "mtp.layers.0.mlp.gate.weight"
            )
        if self.hidden_act != "silu":
            yield f"hidden_act is {self.hidden_act!r}, expected 'silu'"
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            yield (
                f"partial_rotary_factor {self.rope_parameters['partial_rotary_factor']} rotates {self.rotary_dim} "
                f"of head_dim {self.head_dim}, expected an even number up to head_dim"
            )


KEYS = tuple(f.name for f in fields(QNextConfig) if f.name != "mtp_num_experts")
"""The keys of ``config.json`` that a configuration is read from, as far as both dialects share them."""


def read_config(file: Path) -> dict[str, Any]:
    """Parse a ``config.json``; raises ``ValueError`` if the file is not one."""
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not a readable config.json ({e})") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
_POSITIVE = (
    *_REQUIRED,
    "head_dim",
    "linear_conv_kernel_dim",
    "max_position_embeddings",
    "intermediate_size",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "num_nextn_predict_layers",
)


def _check_experts_per_layer(raw: Mapping[str, Any], num_experts: Any) -> None:
    """Raise ``ValueError`` for a checkpoint that is pruned to another number of experts in some layers."""
    found = raw.get("per_layer_num_experts")
    counts = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list) else [found]
    other = sorted({str(count) for count in counts if count not in (None, num_experts)})
    if other:
        raise ValueError(
            f"config.json: per_layer_num_experts holds {', '.join(other[:8])}, expected num_experts {num_experts} in "
            "every layer; take a checkpoint whose layers are all pruned to the same number"
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _not_a_size(name: str, value: Any) -> str:
    return f"{name} is {value!r}, expected an integer from 1 to {LARGEST}"


def _is_positive(value: Any, largest: float = sys.float_info.max) -> bool:
    return type(value) in (int, float) and 0 < value <= largest


def _rope_parameters(raw: Mapping[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = {} if raw.get(key) is None else raw[key]
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {key} is {part!r}, expected an object")
        # `type` is the older name of `rope_type`. If both objects are given, `rope_scaling` wins, as in `transformers`.
        part = {"rope_type": part.get("type"), **part}
        rope |= {name: value for name, value in part.items() if value is not None and name != "type"}
    rope.setdefault("rope_type", "default")
    for name, default, largest in (("rope_theta", None, sys.float_info.max), ("partial_rotary_factor", 0.25, 1)):
        # The top-level value is only a fallback: `transformers` 5 writes a stale default there beside rope_parameters.
        top = raw.get(name)
        if rope.setdefault(name, default if top is None else top) is None:
            raise ValueError(f"config.json: {name} is missing (top level or in rope_parameters)")
        if not _is_positive(rope[name], largest):
            raise ValueError(f"config.json: {name} is {rope[name]!r}, expected a number above 0 and up to {largest:g}")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"config.json: rope_type is {rope['rope_type']!r}, expected one of {list(ROPE_TYPES)}")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", max_position_embeddings)
        for name in ("factor", "original_max_position_embeddings"):
            if not _is_positive(rope.get(name)):
                raise ValueError(f"config.json: YaRN's {name} is {rope.get(name)!r}, expected a positive number")
    return rope
