"""Our validated view of vLLM's configuration. Only ``KeepsBlockSize`` changes vLLM's own objects."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from qnext_plugin.config import QNextConfig
from vllm_ext.compat import KeepsBlockSize

PIPELINE_DRAFT_SCHEDULER = "vllm_ext.scheduler.PipelineDraftScheduler"


def qnext_config(vllm_config: VllmConfig) -> QNextConfig:
    """Return the model's dimensions.

    Raise ``ValueError`` for an inconsistent config or a tensor-parallel size that it cannot take.
    """
    config = QNextConfig.from_dict(vllm_config.model_config.hf_text_config.to_dict())
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    config.check_tensor_parallel(tp_size)
    return config


class CheckedConfig(KeepsBlockSize):
    """The check that vLLM calls once it has a configuration for this architecture, before it starts any process."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_draft(vllm_config)
        KeepsBlockSize.verify_and_update_config(vllm_config)


def check_draft(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` for any draft except the model's own."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("mtp", "qwen3_next_mtp"):
        raise ValueError(
            f"speculative method {speculative.method!r} found, expected 'qwen3_next_mtp': the state of a Gated "
            "DeltaNet layer is kept right with the model's own MTP draft only; change or drop --speculative-config"
        )


def check_speculation(vllm_config: VllmConfig) -> None:
    """Raise ``ValueError`` for any draft except the model's own, and for flags that would make it serve wrongly."""
    check_draft(vllm_config)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if vllm_config.speculative_config is None or stages == 1 or not current_platform.is_cpu():
        return
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "pipeline parallelism with MTP and prefix caching found; on CPU vLLM carries the states of cached "
            "prefixes on the last stage only: add --no-enable-prefix-caching, or drop one of the other two"
        )
    if vllm_config.scheduler_config.scheduler_cls != PIPELINE_DRAFT_SCHEDULER:
        raise ValueError(
            "pipeline parallelism with MTP found; on CPU vLLM's scheduler would put the drafts in the place of "
            f"the token they follow: add --scheduler-cls {PIPELINE_DRAFT_SCHEDULER}"
        )
