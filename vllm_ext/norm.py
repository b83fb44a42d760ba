"""RMSNorm with weights around zero: every norm of the model but the DeltaNet output's."""

import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from qnext_plugin import ops


class ZeroCenteredRMSNorm(GemmaRMSNorm):
    """vLLM's, with an eager CPU path that rounds and allocates less; compiled and on GPU it is vLLM's own."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``norm(x)``, or with a residual ``(norm(x + residual), x + residual)``."""
        if residual is None:
            return ops.zero_centered_rms_norm(x, self.weight, self.variance_epsilon)
        residual = x + residual
        return ops.zero_centered_rms_norm(residual, self.weight, self.variance_epsilon), residual
