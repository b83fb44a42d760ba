"""The Gated DeltaNet cache as vLLM stores it, and the attributes of a layer that kernels read."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.platforms import current_platform

from qnext_plugin.config import GatedDeltaNetDims


class DeltaNetLayer(Protocol):
    """The attributes of a Gated DeltaNet layer that kernels read: sizes and weights on this rank, and caches."""

    dims: GatedDeltaNetDims
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    conv1d: nn.Module
    packed_conv_weight: Tensor
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    norm: Any
    kv_cache: tuple[Tensor, Tensor]

    def split_inputs(self, mixed_qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]: ...

    def get_state_dtype(self) -> tuple[torch.dtype, ...]: ...


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of (conv_state, recurrent_state) by ``--mamba-cache-dtype``, ``--mamba-ssm-cache-dtype``."""
    cache_config = vllm_config.cache_config
    return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache_config.mamba_cache_dtype, cache_config.mamba_ssm_cache_dtype
    )


def state_shapes(
    dims: GatedDeltaNetDims, tp_size: int, num_draft_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of one cache slot on one rank.

    vLLM's GPU kernels keep the recurrent state as ``[num_v_heads, head_v_dim, head_k_dim]``; its CPU kernels and
    ours keep it canonical, ``[num_v_heads, head_k_dim, head_v_dim]``. Both take the same number of bytes.
    """
    conv, (heads, v, k) = MambaStateShapeCalculator.gated_delta_net_state_shape(
        tp_size,
        dims.num_k_heads,
        dims.num_v_heads,
        dims.head_k_dim,
        dims.head_v_dim,
        dims.conv_kernel_size,
        num_draft_tokens,
    )
    return conv, ((heads, k, v) if current_platform.is_cpu() else (heads, v, k))


def copy_blocks(original: Callable[..., None], kv_caches: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
    """Wrap vLLM's copy of cache blocks: pass it the largest view of each page first.

    Layers of different kinds share pages. vLLM copies the first view of each address and skips the others.
    """
    original(sorted(kv_caches, key=lambda view: view.nbytes, reverse=True), *args, **kwargs)


def conv_view(conv_state: torch.Tensor) -> torch.Tensor:
    """Return the convolution cache as ``[slots, conv_dim, columns]``, whichever axis vLLM puts first."""
    return conv_state if is_conv_state_dim_first() else conv_state.transpose(1, 2)
