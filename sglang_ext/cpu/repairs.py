"""Ours in the place of what SGLang does not do right on CPUs; ``compat.REPLACEMENTS`` says why and until when."""

from collections.abc import Callable
from typing import Any

import torch


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """``Tensor.pin_memory`` where torch cannot pin: the tensor itself."""
    return tensor


def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
    """An entry of ``ALLOC_MEMORY_FUNCS`` that does not pin."""
    return torch.empty(dims, dtype=dtype, device=device)


class Unpinned:
    """``torch``, whose constructors do not pin."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


UNPINNED = Unpinned()


def run_lora_b(original: Callable[..., torch.Tensor], backend: Any, **kwargs: Any) -> torch.Tensor:
    """``TorchNativeLoRABackend.run_lora_b_sgemm`` for linears that are not split, which leave an argument out."""
    kwargs.setdefault("output_offset_cpu", kwargs["output_offset"])
    return original(backend, **kwargs)


def has_moe_module(model: Any) -> bool:
    """``LoRAMemoryPool._has_moe_module`` where nothing computes adapters of routed experts."""
    return False


def select_top_k_tokens(original: Callable[..., Any], *args: Any) -> Any:
    """``spec_utils._select_top_k_tokens_later`` as it is written, not compiled."""
    return getattr(original, "_torchdynamo_orig_callable", original)(*args)
