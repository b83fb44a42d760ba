"""The contract of causal-conv1d, whose operator is compiled CUDA."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.gpu.dry.trace import TRACE


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"contract: causal_conv1d_fn wants {message}")


def check(x: Tensor, weight: Tensor, seq_idx: Tensor) -> None:
    """Check what causal-conv1d's C++ code checks of packed sequences."""
    batch, channels, length = x.shape
    floats = (torch.bfloat16, torch.float16, torch.float32)
    require(x.dtype in floats and weight.dtype in floats, f"floats of 16 or 32 bits, not {x.dtype} and {weight.dtype}")
    require(x.stride(1) == 1, f"channels last, strides {x.stride()}")
    require(channels % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0, f"multiples of 8, strides {x.stride()}")
    require(weight.shape[0] == channels and 2 <= weight.shape[1] <= 4, f"2 to 4 columns, not {tuple(weight.shape)}")
    require(seq_idx.dtype == torch.int32 and seq_idx.is_contiguous(), f"contiguous int32, not {seq_idx.dtype}")
    require(seq_idx.shape == (batch, length), f"a sequence for each token, not {tuple(seq_idx.shape)}")
    require(x.device == weight.device == seq_idx.device, "all on one GPU")


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: None = None, *, seq_idx: Tensor, activation: str) -> Tensor:
    check(x, weight, seq_idx)
    TRACE.launch("custom", "causal_conv1d_fn")
    with TRACE.silent():
        return torch.empty_like(x)


def install() -> None:
    stub: Any = ModuleType("causal_conv1d")
    stub.causal_conv1d_fn = causal_conv1d_fn
    sys.modules["causal_conv1d"] = stub
