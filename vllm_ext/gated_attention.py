"""Softmax attention with per-head QK norm, partial RoPE and a sigmoid output gate."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_qk_norm_rope import fused_qk_rmsnorm_rope_gate
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from qnext_plugin.config import QNextConfig
from vllm_ext.norm import ZeroCenteredRMSNorm


class GatedAttention(nn.Module):
    """An attention layer that maps ``[num_tokens, hidden_size]`` to the same shape.

    ``q_proj`` returns query and gate interleaved by head, as stored. vLLM's fused prologue takes them in this form;
    without it, both are views of the output.
    """

    def __init__(
        self,
        config: QNextConfig,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            2 * config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            reduce_results=reduce_results,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            # vLLM's table ends here; VLLM_ALLOW_LONG_MAX_MODEL_LEN allows positions past the trained length.
            max_position=max(config.max_position_embeddings, vllm_config.model_config.max_model_len),
            rope_parameters=dict(config.rope_parameters),
        )
        self.attn = Attention(
            self.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.fused_prologue = current_platform.is_cuda() and vllm_config.model_config.dtype in (
            torch.float16,
            torch.bfloat16,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q_gate, k, v = qkv.split(
            [
                2 * self.num_heads * self.head_dim,
                self.num_kv_heads * self.head_dim,
                self.num_kv_heads * self.head_dim,
            ],
            dim=-1,
        )
        if self.fused_prologue:
            q, k, gate = fused_qk_rmsnorm_rope_gate(
                q_gate,
                k,
                self.q_norm.weight,
                self.k_norm.weight,
                self.rotary_emb.cos_sin_cache,
                positions,
                self.q_norm.variance_epsilon,
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.rotary_emb.rotary_dim,
                norm_beta=1.0,
            )
            out = self.attn(q, k, v) * torch.sigmoid(gate)
        else:
            q, gate = q_gate.unflatten(-1, (self.num_heads, 2, self.head_dim)).unbind(-2)
            q = self.q_norm(q).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
            q, k = self.rotary_emb(positions, q, k)
            out = self.attn(q, k, v).unflatten(-1, (self.num_heads, self.head_dim)) * torch.sigmoid(gate)
            out = out.flatten(-2)
        return self.o_proj(out)[0]
