"""RMSNorm with zero-centered weights: every norm of the model except that of the DeltaNet output."""

import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from qnext_plugin import ops


class ZeroCenteredRMSNorm(GemmaRMSNorm):
    """vLLM's norm with an eager CPU path that rounds and allocates less; compiled or on GPUs it is vLLM's own."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return ``norm(x)``, or with a residual ``(norm(x + residual), x + residual)``."""
        if residual is None:
            return ops.zero_centered_rms_norm(x, self.weight, self.variance_epsilon)
        residual = x + residual
        return ops.zero_centered_rms_norm(residual, self.weight, self.variance_epsilon), residual
