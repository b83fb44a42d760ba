"""The two RMS norms of Qwen3-Next, over the last dimension.

They compute in float32 (float64 for float64 inputs) and return ``x``'s dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``weight * x / rms(x) * silu(gate)``, the norm of DeltaNet outputs.

    ``x``, ``gate`` [..., D], ``weight`` [D].
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    out = _normalized(x, eps, compute).mul_(weight.to(compute))
    return out.mul_(F.silu(gate.to(compute, copy=True), inplace=True)).to(x.dtype)


def zero_centered_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``(1 + weight) * x / rms(x)``, every other norm of the model. ``x`` [..., D], ``weight`` [D]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return _normalized(x, eps, compute).mul_(1 + weight.to(compute)).to(x.dtype)


def _normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return ``x / rms(x)`` as a new tensor that callers may overwrite: allocating costs more than the arithmetic."""
    out = x.to(dtype, copy=True)
    mean_square = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return out.mul_(mean_square.add_(eps).rsqrt_())
