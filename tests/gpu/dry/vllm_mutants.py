"""Our layer broken on purpose, to see that the dry run notices; ``vllm_start --mutant NAME``."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_ext import gpu_kernels
from vllm_ext.gpu_kernels import GpuKernels


def _before(name: str, what: Callable[..., None]) -> None:
    original = getattr(GpuKernels, name)

    def mutated(self: GpuKernels, *args: Any) -> Any:
        what(*args)
        return original(self, *args)

    setattr(GpuKernels, name, mutated)


def wait() -> None:
    """A step that verifies drafts, and that graphs capture, waits for the GPU."""
    _before("_fused_verify", lambda layer, metadata, mixed, *rest: mixed.sum().item())


def host_tensor() -> None:
    """The delta rule's input is added to a tensor of the host."""
    _before("_fused_verify", lambda layer, metadata, mixed, *rest: mixed.add_(torch.ones(mixed.shape)))


def strided_slots() -> None:
    """The table of slots is passed on as columns of a wider one."""
    gpu_kernels.once = lambda metadata, name, make: torch.zeros(
        *make().shape[:-1], make().shape[-1] + 2, dtype=torch.int32, device="cuda"
    )[..., :-2]


def copied_gate() -> None:
    """The gate is copied before the norm."""
    _before("_norm", lambda layer, z, out: z.contiguous())


def off_by_one() -> None:
    """The fused kernel's output is a row short."""
    _before("_fused_verify", lambda layer, metadata, mixed, z, b, a, out: out.resize_(len(out) - 1, *out.shape[1:]))
