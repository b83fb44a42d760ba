"""The two RMS norms of Qwen3-Next, over the last dimension; float32 inside, results in ``x``'s dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / rms(x) * silu(gate)``: the DeltaNet output norm. ``x``, ``gate`` [..., D], ``weight`` [D]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(compute), weight.shape, weight.to(compute), eps)
    return (normed * F.silu(gate.to(compute))).to(x.dtype)


def zero_centered_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``(1 + weight) * x / rms(x)``: every other norm of the model. ``x`` [..., D], ``weight`` [D]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(compute), weight.shape, 1 + weight.to(compute), eps).to(x.dtype)
