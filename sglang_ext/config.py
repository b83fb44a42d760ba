"""Completes SGLang's configuration class: both dialects, irregular layer types and correct RoPE."""

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.configs.qwen3_next import HybridLayerType
from sglang.srt.configs.qwen3_next import Qwen3NextConfig as EngineConfig
from sglang.srt.utils.hf_transformers_utils import get_config
from transformers import PretrainedConfig

from qnext_plugin.checkpoint.kinds import check_kind
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import FULL, QNextConfig
from qnext_plugin.ops import packages
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


def drafting(spec: Any, model: Any, checkpoint: Checkpoint, config: QNextConfig, pp_size: int = 1) -> str:
    """Return which of SGLang's algorithms drafts, by the name that users give it; empty if none does.

    ``spec`` and ``model`` have SGLang's options of speculation and of the model under its own names. Raise
    ``ValueError``, which says what is possible for the checkpoint, for drafts that are not served.
    """
    algorithm, draft = spec.speculative_algorithm, spec.speculative_draft_model_path
    if algorithm is None:
        return ""
    possible = "NGRAM, STANDALONE with a draft model or EAGLE3 with a draft head"
    if checkpoint.may_draft:
        possible = f"NEXTN without a draft model, {possible}"
    found = f"--speculative-algorithm {algorithm} found"
    if algorithm == "EAGLE" and draft in (None, model.model_path) and not spec.enable_multi_layer_eagle:
        algorithm = "NEXTN"  # SGLang has renamed it
    elif algorithm == "NGRAM":
        if spec.speculative_ngram_max_bfs_breadth < 2:
            raise ValueError(
                f"--speculative-ngram-max-bfs-breadth {spec.speculative_ngram_max_bfs_breadth} found, expected 2 or "
                "more: even then several matches make a tree of drafts, and SGLang would compute the states of a chain"
            )
    elif algorithm in ("STANDALONE", "EAGLE3"):
        check_draft(algorithm, draft, spec.speculative_draft_model_revision, model.trust_remote_code, config)
    else:
        named = f" with draft model {draft}" if draft else ""
        named += " and --enable-multi-layer-eagle" if spec.enable_multi_layer_eagle else ""
        raise ValueError(
            f"{found}{named}, expected {possible}: only with these are the states of Gated DeltaNet layers tested; "
            "change or drop the flags, or set QNEXT_DISABLE=1 for SGLang's own model"
        )
    if algorithm != "NEXTN" and pp_size > 1:
        raise ValueError(f"{found} with --pp-size {pp_size}, expected 1: pipelines are tested with NEXTN only")
    if ON_CPU and spec.speculative_use_rejection_sampling:
        raise ValueError("--speculative-use-rejection-sampling found, expected none: it needs a GPU; drop it")
    return algorithm


def check_grammars(backend: str | None, drafts: str) -> None:
    """Raise ``ValueError`` if SGLang cannot hold drafts to a grammar with this ``--grammar-backend``."""
    if drafts and backend == "outlines":
        raise ValueError(
            "--grammar-backend outlines found with drafts, expected xgrammar or llguidance: its grammars cannot take "
            "back a draft, and SGLang would end or answer outside of a grammar; change it, or drop the drafts"
        )


def check_draft(
    algorithm: str, draft: str | None, revision: str | None, trust_remote_code: bool, config: QNextConfig
) -> None:
    """Raise ``ValueError`` if SGLang could not draft with the model at ``draft`` for one of ``config``."""
    found = f"--speculative-algorithm {algorithm}"
    if draft is None:
        raise ValueError(f"{found} found without a model to draft with; add --speculative-draft-model-path")
    values = get_config(draft, trust_remote_code=trust_remote_code, revision=revision)
    found += f" with {draft}"
    if hasattr(type(values), "mamba2_cache_params"):
        raise ValueError(
            f"{found}, a {values.model_type}, found, expected a draft without recurrent states: SGLang does not take "
            "back the draft's own"
        )
    if values.vocab_size != config.vocab_size:
        raise ValueError(
            f"{found} found, which has {values.vocab_size} token ids, expected {config.vocab_size} as the model has"
        )
    if algorithm == "EAGLE3":
        check_head(found, values, config)


def check_head(found: str, values: PretrainedConfig, config: QNextConfig) -> None:
    """Raise ``ValueError`` if an EAGLE3 head reads other hidden states than the model has."""
    architecture = (values.architectures or [""])[0]
    if not architecture.endswith("Eagle3"):
        raise ValueError(f"{found}, a {architecture}, found, expected the head of an EAGLE3 draft")
    width = getattr(values, "target_hidden_size", None) or values.hidden_size
    if width != config.hidden_size:
        raise ValueError(f"{found} found, for a model of hidden size {width}, expected {config.hidden_size}")
    settings = getattr(values, "eagle_config", None) or {}
    captured = captured_layers(config, settings.get("eagle_aux_hidden_state_layer_ids"))
    if not 0 < min(captured) <= max(captured) < config.num_hidden_layers or len(set(captured)) < len(captured):
        raise ValueError(
            f"{found} found, which reads the inputs of layers {captured}, expected different ones of layers 1 to "
            f"{config.num_hidden_layers - 1}"
        )


def captured_layers(config: QNextConfig, layer_ids: list[int] | None) -> list[int]:
    """Return the layers whose inputs a draft reads: those after ``layer_ids``, or SGLang's own choice for EAGLE3."""
    last = config.num_hidden_layers
    return [2, last // 2, last - 3] if layer_ids is None else [idx + 1 for idx in layer_ids]


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


def check_packages(option: str | None, keeps_middle_states: bool) -> tuple[str, ...]:
    """Return the packages that ``--linear-attn-prefill-backend`` names; raise ``ValueError`` if one cannot serve.

    ``keeps_middle_states`` tells whether the cache of prefixes keeps states of the middle of a prompt.
    """
    found = packages.asked(option)
    if ON_CPU and found:
        raise ValueError(f"--linear-attn-prefill-backend {option} found, whose kernels need a GPU; drop it")
    for name in found:
        packages.load(name)
    if "fla" in found and keeps_middle_states:
        raise ValueError(
            f"--linear-attn-prefill-backend {option} found with a prefix cache that keeps states of the middle of a "
            "prompt, which flash-linear-attention does not return; add --disable-radix-cache, or "
            "--mamba-radix-cache-strategy no_buffer and --disable-overlap-schedule"
        )
    return found


def draft_config(config: QNextConfig) -> QNextConfig:
    """Return the config of the draft's only layer: full attention, and sparse if there are experts.

    It does not depend on the types of the trunk's layers.
    """
    return replace(config.draft, num_hidden_layers=1, layer_types=(FULL,), mlp_only_layers=(), decoder_sparse_step=1)
