"""The norms of the model: SGLang's, and one for the DeltaNet output that also serves on CPUs."""

import torch
from sglang.kernels.ops.attention.fla.layernorm_gated import RMSNorm
from sglang.srt.layers.layernorm import GemmaRMSNorm as ZeroCenteredRMSNorm

from qnext_plugin import ops
from sglang_ext.compat import ON_CPU

__all__ = ["RMSNormGated", "ZeroCenteredRMSNorm"]


class RMSNormGated(RMSNorm):
    """``norm(x) * silu(z)`` over the last dimension; ``x``, ``z`` [num_tokens, num_v_heads, head_v_dim]."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if ON_CPU:
            return ops.rms_norm_gated(x, z, self.weight, self.eps)
        return super().forward(x.flatten(0, 1), z).view(x.shape)
