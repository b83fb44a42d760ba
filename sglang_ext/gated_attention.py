"""Softmax attention with per-head QK norm, partial RoPE and a sigmoid output gate."""

import torch
from sglang.kernels.ops.elementwise.elementwise import fused_sigmoid_mul
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import add_prefix, is_cuda
from torch import nn

from qnext_plugin.config import QNextConfig
from sglang_ext.norm import ZeroCenteredRMSNorm


class GatedAttention(nn.Module):
    """An attention layer that maps ``[num_tokens, hidden_size]`` to this rank's partial sum of the same shape.

    ``q_proj`` returns query and gate interleaved by head, as stored. SGLang's fused prologue takes them in this form;
    without it, both are views of the output.
    """

    def __init__(
        self, config: QNextConfig, layer_idx: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        tp_size = get_parallel().attn_tp_size
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
            prefix=add_prefix("qkv_proj", prefix),
            parallel_group="attn_tp",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            reduce_results=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
            parallel_group="attn_tp",
        )
        self.q_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            config.head_dim,
            rotary_dim=config.rotary_dim,
            max_position=config.max_position_embeddings,
            base=config.rope_parameters["rope_theta"],
            rope_scaling=dict(config.rope_parameters),
        )
        # What a trainer computes is met only by norms and rotation in its own order.
        self.fused = is_cuda() and get_exec().deterministic.rl_on_policy_target is None
        self.attn = RadixAttention(
            self.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_idx,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        kv_size = self.num_kv_heads * self.head_dim
        q_gate, k, v = qkv.split([2 * self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        q, k, gate = self._prologue(positions, q_gate, k)
        out = self.attn(q, k, v, forward_batch)
        if self.fused:
            out = fused_sigmoid_mul(out, gate, inplace=True)
        else:
            out = (out.unflatten(-1, (self.num_heads, self.head_dim)) * torch.sigmoid(gate)).flatten(-2)
        return self.o_proj(out)[0]

    def _prologue(
        self, positions: torch.Tensor, q_gate: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply norms and RoPE; return ``q`` and ``k`` flat, and ``gate`` as [num_tokens, num_heads, head_dim]."""
        if self.fused:
            from sglang.kernels.ops.attention.fused_qk_rmsnorm_rope_gate import fused_qk_gemma_rmsnorm_rope_gate

            return fused_qk_gemma_rmsnorm_rope_gate(
                q_gate,
                k,
                self.q_norm.weight.data,
                self.k_norm.weight.data,
                self.rotary_emb.cos_sin_cache,
                positions,
                self.q_norm.variance_epsilon,
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                self.rotary_emb.rotary_dim,
            )
        q, gate = q_gate.unflatten(-1, (self.num_heads, 2, self.head_dim)).unbind(-2)
        q = self.q_norm(q).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, gate
