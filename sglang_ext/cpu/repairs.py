"""Replacements for what SGLang does wrong on CPUs; ``compat.REPLACEMENTS`` tells why and until when."""

from collections.abc import Callable
from typing import Any

import torch


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """Replace ``Tensor.pin_memory`` where torch cannot pin: return the tensor itself."""
    return tensor


def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
    """Allocate a tensor without pinning it, as an entry of ``ALLOC_MEMORY_FUNCS``."""
    return torch.empty(dims, dtype=dtype, device=device)


class Unpinned:
    """A stand-in for ``torch`` whose constructors do not pin."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


UNPINNED = Unpinned()


def run_lora_b(original: Callable[..., torch.Tensor], backend: Any, **kwargs: Any) -> torch.Tensor:
    """Wrap ``TorchNativeLoRABackend.run_lora_b_sgemm``: add the argument that linears without a split leave out."""
    kwargs.setdefault("output_offset_cpu", kwargs["output_offset"])
    return original(backend, **kwargs)


def has_moe_module(model: Any) -> bool:
    """Replace ``LoRAMemoryPool._has_moe_module``: nothing computes adapters of routed experts here."""
    return False


def select_top_k_tokens(original: Callable[..., Any], *args: Any) -> Any:
    """Wrap ``spec_utils._select_top_k_tokens_later``: run it as written, not compiled."""
    return getattr(original, "_torchdynamo_orig_callable", original)(*args)
