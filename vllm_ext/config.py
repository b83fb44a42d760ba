"""Our validated view of vLLM's configuration; the engine's own objects are never changed."""

from vllm.config import VllmConfig

from qnext_plugin.config import QNextConfig


def qnext_config(vllm_config: VllmConfig) -> QNextConfig:
    """The model's dimensions; ``ValueError`` for an inconsistent config or a tensor-parallel size it cannot take."""
    config = QNextConfig.from_dict(vllm_config.model_config.hf_text_config.to_dict())
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    config.check_tensor_parallel(tp_size)
    return config
