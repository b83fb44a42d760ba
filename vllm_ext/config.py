"""Our validated view of vLLM's configuration. ``CheckedConfig`` alone changes vLLM's own objects, and
``Qwen3NextConfig`` takes the place of the class of ``transformers``.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen3NextConfig as TransformersConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qnext_plugin.checkpoint.cache_scales import asks_for_fp8_cache
from qnext_plugin.checkpoint.stored import read_served, refuse_quantizing
from qnext_plugin.config import KEYS, QNextConfig
from vllm_ext.compat import KeepsBlockSize, prepare_numba

logger = init_logger("vllm.qnext_plugin")

PIPELINE_DRAFT_SCHEDULER = "vllm_ext.scheduler.PipelineDraftScheduler"


class Qwen3NextConfig(TransformersConfig):
    """The model's configuration for vLLM, which sets the values of ``config.json``, then those of ``--hf-overrides``.

    A dictionary about RoPE changes only what it names, and may use the older name ``type``; vLLM itself would replace
    all of it, and look for ``rope_type``. A ``num_nextn_predict_layers`` of 0 is dropped, because vLLM divides by it,
    and only the tensors tell whether there is a draft. Where ``config.json`` has null, the default holds.
    """

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "num_nextn_predict_layers" and value == 0:
            return
        if key in KEYS and value is None:
            value = getattr(type(self), key, None)
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            before = getattr(self, "rope_parameters", None) or {}
            kind = {"rope_type": value["type"]} if "type" in value else {}
            value = before | kind | {name: item for name, item in value.items() if name != "type"}
        super().__setattr__(key, value)


def qnext_config(vllm_config: VllmConfig) -> QNextConfig:
    """Return the model's dimensions.

    Raise ``ValueError`` for an inconsistent config, a tensor-parallel size that it cannot take, or heads of a size for
    which vLLM has no attention on a CPU; vLLM itself fails at the first request.
    """
    config = QNextConfig.from_dict(vllm_config.model_config.hf_text_config.to_dict())
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        if not CPUAttentionBackend.supports_head_size(config.head_dim):
            raise ValueError(
                f"head_dim is {config.head_dim}, expected one of {CPUAttentionBackend.get_supported_head_sizes()}: "
                "vLLM has no attention kernel for others on CPUs; serve this checkpoint with SGLang, or on a GPU"
            )
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    config.check_tensor_parallel(tp_size)
    return config


_QUANTIZES = "int8_per_channel_weight_only"  # the experts


class CheckedConfig(KeepsBlockSize):
    """The check that vLLM calls once it has a configuration for this architecture, before it starts any process."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        method, stored = model_config.quantization, model_config.model_arch_config.quantization_config
        if not current_platform.is_cpu() or method is None or stored is not None:
            return
        if not torch.cpu._is_amx_tile_supported():
            refuse_quantizing(method)
        if method != _QUANTIZES:
            refuse_quantizing(method, f"vLLM has a kernel for {_QUANTIZES} alone")

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_draft(vllm_config)
        prepare_numba(vllm_config)
        choose_cache_dtype(vllm_config)
        if note := cache_memory_note(vllm_config.cache_config.kv_cache_memory_bytes):
            logger.warning("%s; %s", *note)
        KeepsBlockSize.verify_and_update_config(vllm_config)


def quantization_of(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """Return the checkpoint's description of its quantization, overrides of the command line included."""
    found = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()


def cache_memory_note(asked: int | None) -> tuple[str, str] | None:
    """Return what vLLM does not say, and a way out, if the environment overrides ``--kv-cache-memory-bytes``.

    ``asked`` are the bytes of that flag, before vLLM's platform for CPUs changes the configuration.
    """
    name = "VLLM_CPU_KVCACHE_SPACE"
    if asked is None or not current_platform.is_cpu() or not (space := os.environ.get(name)):
        return None
    if int(space) << 30 == asked:
        return None
    return f"{name}={space} (GiB) overrides --kv-cache-memory-bytes {asked}", f"unset {name}"


def choose_cache_dtype(vllm_config: VllmConfig) -> None:
    """Keep keys and values in FP8 if the checkpoint asks for it, no flag for another type, and this device can.

    vLLM knows some descriptions of a quantization only when it constructs the layers, too late for other parts of the
    configuration. Raise ``ValueError`` for a flag for FP8 on a CPU that lacks it, unless the checkpoint asks for the
    same: vLLM has then put the flag's value for ``auto`` in some cases, so that the two cannot be told apart.
    """
    cache_config, asked = vllm_config.cache_config, asks_for_fp8_cache(quantization_of(vllm_config))
    reason = missing_fp8_cache(vllm_config)
    if reason is None:
        if asked and cache_config.cache_dtype == "auto":
            cache_config.cache_dtype = "fp8"
    elif asked and cache_config.cache_dtype in ("auto", "fp8_e4m3"):  # vLLM has put the second for the first
        cache_config.cache_dtype = "auto"
        logger.info("keys and values are kept in %s, not in FP8: %s", vllm_config.model_config.dtype, reason)
    elif cache_config.cache_dtype.startswith("fp8"):
        raise ValueError(
            f"--kv-cache-dtype {cache_config.cache_dtype} found, expected auto or bfloat16 on this CPU: {reason}"
        )


def missing_fp8_cache(vllm_config: VllmConfig) -> str | None:
    """Return why this CPU cannot keep keys and values in FP8, in vLLM's words."""
    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    try:
        _get_attn_isa(torch.bfloat16, 32, vllm_config.model_config.get_head_size(), "fp8")
    except NotImplementedError as e:
        return str(e)
    return None


def scatters_tokens(config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Return whether each tensor-parallel rank keeps a share of the tokens between attention and the next one.

    vLLM computes experts so with tensor, data and expert parallelism; its pipeline stages exchange all tokens.
    """
    parallel = vllm_config.parallel_config
    layers = range(config.num_hidden_layers)
    return (
        parallel.use_sequence_parallel_moe
        and parallel.pipeline_parallel_size == 1
        and all(config.is_sparse(idx) for idx in layers)
    )


def check_runner(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` on a CPU where vLLM's second model runner, its default on GPUs, would serve untested.

    vLLM chooses it on a CPU where it finds Triton, as in its official image for CPUs.
    """
    staged = vllm_config.parallel_config.pipeline_parallel_size > 1
    if staged and current_platform.is_cpu() and vllm_config.use_v2_model_runner:
        raise ValueError(
            "pipeline parallelism with vLLM's second model runner found; on CPU it is tested with the first one only: "
            "set VLLM_USE_V2_MODEL_RUNNER=0"
        )


SPECULATIVE_METHODS = ("mtp", "ngram", "suffix", "eagle3", "dflash")
"""The methods with which states are tested to go on from the last accepted token, whatever was drafted."""
_BY_BATCH = "num_speculative_tokens_per_batch_size"
_TESTED_OPTIONS = {"rejection_sample_method": "standard", "draft_sample_method": "greedy"}


def uses_mtp(vllm_config: VllmConfig) -> bool:
    """Return whether the checkpoint's own ``mtp.*`` layers draft."""
    return vllm_config.speculative_config is not None and vllm_config.speculative_config.method == "mtp"


def check_draft(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` for a way to draft, or to verify drafts, that is not tested with this model."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in SPECULATIVE_METHODS:
        raise ValueError(
            f"speculative method {speculative.method!r} found, expected one of {', '.join(_possible(vllm_config))}: "
            "only with these are the states of Gated DeltaNet layers tested; change or drop --speculative-config"
        )
    if speculative.parallel_drafting and speculative.method != "dflash":  # which vLLM always runs so
        raise ValueError(
            f"parallel_drafting found in --speculative-config with {speculative.method!r}: it is tested with 'dflash' "
            "only; drop parallel_drafting"
        )
    for key, tested in _TESTED_OPTIONS.items():
        found = getattr(speculative, key)
        if found != tested:
            raise ValueError(
                f"{key} {found!r} found in --speculative-config, expected {tested!r}: nothing else is tested with this "
                f"model; drop {key}"
            )
    if speculative.uses_dynamic_speculative_decoding() and speculative.method != "mtp":
        raise ValueError(
            f"{_BY_BATCH} found in --speculative-config with {speculative.method!r}: it is tested with 'mtp' only; "
            f"drop {_BY_BATCH}"
        )


def _possible(vllm_config: VllmConfig) -> list[str]:
    """Return the methods that can draft for this checkpoint, which may have no ``mtp.*``."""
    model, loading = vllm_config.model_config, vllm_config.load_config
    checkpoint = read_served(model.model, model.revision, loading.load_format, loading.download_dir)
    return [method for method in SPECULATIVE_METHODS if checkpoint.may_draft or method != "mtp"]


def check_speculation(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` for drafts that are not tested with this model, and for flags that would serve wrongly."""
    check_draft(vllm_config)
    speculative, stages = vllm_config.speculative_config, vllm_config.parallel_config.pipeline_parallel_size
    if speculative is None or stages == 1 or not current_platform.is_cpu():
        return
    if speculative.method != "mtp":
        raise ValueError(
            f"pipeline parallelism with speculative method {speculative.method!r} found; on CPU stages before the last "
            "follow only the drafts of MTP: drop one of the two"
        )
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "pipeline parallelism with MTP and prefix caching found; on CPU vLLM carries the states of cached "
            "prefixes on the last stage only: add --no-enable-prefix-caching, or drop one of the other two"
        )
    if speculative.uses_dynamic_speculative_decoding():
        raise ValueError(
            f"pipeline parallelism with {_BY_BATCH} in --speculative-config found; on CPU it is not tested: drop one "
            "of the two"
        )
    if vllm_config.scheduler_config.scheduler_cls != PIPELINE_DRAFT_SCHEDULER:
        raise ValueError(
            "pipeline parallelism with MTP found; on CPU vLLM's scheduler would put the drafts in the place of "
            f"the token they follow: add --scheduler-cls {PIPELINE_DRAFT_SCHEDULER}"
        )
