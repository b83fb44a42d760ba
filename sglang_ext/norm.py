"""The model's norms: SGLang's own, and one for the DeltaNet output that also runs on CPUs."""

import torch
from sglang.kernels.ops.attention.fla.layernorm_gated import RMSNorm
from sglang.srt.layers.layernorm import GemmaRMSNorm as ZeroCenteredRMSNorm

from qnext_plugin import ops
from sglang_ext.compat import ON_CPU

__all__ = ["RMSNormGated", "ZeroCenteredRMSNorm"]


class RMSNormGated(RMSNorm):
    """The norm ``norm(x) * silu(z)`` over the last dimension of ``x``, ``z`` [num_tokens, num_v_heads, head_v_dim]."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if ON_CPU:
            return ops.rms_norm_gated(x, z, self.weight, self.eps)
        return super().forward(x.flatten(0, 1), z).view(x.shape)
