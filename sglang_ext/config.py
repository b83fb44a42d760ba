"""Completes SGLang's configuration class: both dialects, irregular layer types and correct RoPE."""

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.configs.qwen3_next import HybridLayerType
from sglang.srt.configs.qwen3_next import Qwen3NextConfig as EngineConfig
from transformers import PretrainedConfig

from qnext_plugin.checkpoint.kinds import check_kind
from qnext_plugin.config import FULL, QNextConfig
from sglang_ext import compat
from sglang_ext.compat import ON_CPU, unpadded
from sglang_ext.state import cache_params

ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")


class Qwen3NextConfig(EngineConfig):
    """The model's configuration for SGLang, which also finds tokenizers and processors by this class's name.

    The parent drops ``layer_types`` and, in one of the dialects, everything about RoPE. The constructor raises
    ``ValueError`` where ``QNextConfig`` finds inconsistent values; without arguments it creates the parent's default.
    """

    def __init__(self, **values: Any) -> None:
        # The parent checks RoPE before it has set what RoPE depends on, so we pass it none.
        super().__init__(**{name: value for name, value in values.items() if name not in ROPE})
        if not values:
            return
        check_kind("config.json", values)  # SGLang's own words for some of these come before the model's
        if "quantization_config" in values:
            compat.apply(compat.Uses(quantization=True))
        config = QNextConfig.from_dict(values)
        self.layer_types = list(config.layer_types)
        self.mlp_only_layers = list(config.mlp_only_layers)
        if values.get("num_nextn_predict_layers") is not None:  # SGLang sizes the draft's cache by it
            self.num_nextn_predict_layers = config.num_nextn_predict_layers
        self.rope_parameters = dict(config.rope_parameters)
        self.rope_theta = config.rope_parameters["rope_theta"]
        self.partial_rotary_factor = config.rope_parameters["partial_rotary_factor"]

    @property
    def layers_block_type(self) -> list[str]:
        return [
            (HybridLayerType.full_attention if kind == FULL else HybridLayerType.linear_attention).value
            for kind in qnext_config(self).layer_types
        ]

    @property
    def mamba2_cache_params(self) -> Any:
        return cache_params(qnext_config(self), self, self.linear_layer_ids)


def qnext_config(config: PretrainedConfig, tp_size: int = 1) -> QNextConfig:
    """Return our validated view of ``config`` as it is now, with overrides of the command line.

    Raise ``ValueError`` for inconsistent values or a tensor-parallel size that they do not allow.
    """
    values = unpadded(config.to_dict())
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") == "default" and "type" in rope:
        # SGLang merges an override in the older spelling, `type`, into our dictionary, which has the newer one.
        values["rope_parameters"] = rope | {"rope_type": rope["type"]}
    view = QNextConfig.from_dict(values)
    view.check_tensor_parallel(tp_size)
    return view


def speculates(spec: Any, model_path: str) -> bool:
    """Return whether the user requests the model's own draft; raise ``ValueError`` for any other draft.

    ``spec`` has the options of speculation under SGLang's names.
    """
    algorithm, draft = spec.speculative_algorithm, spec.speculative_draft_model_path
    if algorithm is None:
        return False
    if algorithm != "EAGLE" or draft not in (None, model_path) or spec.enable_multi_layer_eagle:
        raise ValueError(
            f"speculative algorithm {algorithm!r} with draft model {draft!r} found, expected NEXTN without one: the "
            "state of a Gated DeltaNet layer is kept right with the model's own MTP draft only; change or drop "
            "--speculative-algorithm, or set QNEXT_DISABLE=1 for SGLang's own model"
        )
    if ON_CPU and spec.speculative_use_rejection_sampling:
        raise ValueError("--speculative-use-rejection-sampling found, expected none: it needs a GPU; drop it")
    return True


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ``ValueError`` for a float32 model on a GPU: no prompt could be computed, and the server would end."""
    if dtype == torch.float32 and not ON_CPU:
        raise ValueError(
            "--dtype float32 found, expected bfloat16 or float16: SGLang's kernels for prompts of DeltaNet layers on "
            "GPUs refuse float32; change it"
        )


def check_exchange(backend: str | None) -> None:
    """Raise ``ValueError`` if our experts cannot exchange tokens among ranks by this ``--moe-a2a-backend``."""
    if backend == "megamoe":
        raise ValueError(
            "--moe-a2a-backend megamoe found, expected another one: these experts have no megamoe kernel; drop it, "
            "or set QNEXT_DISABLE=1 to serve SGLang's own model"
        )


def draft_config(config: QNextConfig) -> QNextConfig:
    """Return the config of the draft's only layer: full attention, and sparse if there are experts.

    It does not depend on the types of the trunk's layers.
    """
    return replace(config.draft, num_hidden_layers=1, layer_types=(FULL,), mlp_only_layers=(), decoder_sparse_step=1)
