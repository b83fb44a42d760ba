"""Our validated view of vLLM's configuration; the engine's own objects are never changed."""

from vllm.config import VllmConfig

from qnext_plugin.config import QNextConfig


def qnext_config(vllm_config: VllmConfig) -> QNextConfig:
    """The model's dimensions; ``ValueError`` for an inconsistent config or a tensor-parallel size it cannot take."""
    config = QNextConfig.from_dict(vllm_config.model_config.hf_text_config.to_dict())
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    config.gdn.shard(tp_size)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % tp_size or max(kv_heads, tp_size) % min(kv_heads, tp_size):
        raise ValueError(
            f"tensor parallel size {tp_size} cannot split num_attention_heads {heads} with "
            f"num_key_value_heads {kv_heads}; it must divide the first and divide, or be a multiple of, the second"
        )
    return config
