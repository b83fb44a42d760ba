"""Which kernels serve a Gated DeltaNet layer.

======  =======================================================  ==================================================
device  condition                                                serves
======  =======================================================  ==================================================
GPU     float32 prefill, which vLLM's backends refuse            ``qnext_plugin.ops`` behind vLLM's convolution
GPU     otherwise                                                ``gpu_kernels``: vLLM's Triton, CUDA and FlashInfer
CPU     convolution: bfloat16, width 4, AVX512-BF16 or Arm bf16  ``cpp``: vLLM's C++ convolution
CPU     delta rule: bfloat16, K = V in (64, 128)                 ``cpp``: vLLM's C++ delta rule
CPU     that of prompts on x86 without AVX512                    ``torch``, in a ninth of the time of vLLM's
CPU     otherwise, each on its own                               ``torch``: ``qnext_plugin.ops``, any dtype and size
======  =======================================================  ==================================================

Matrix products are vLLM's choice, but for bfloat16 on CPUs with AVX512-BF16 and without AMX, and on CPUs with AVX2 and
nothing for bfloat16 (``cpu_gemm``).
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn  # noqa: F401  registers the op that calls us
from vllm.platforms import current_platform

from qnext_plugin.config import GatedDeltaNetDims, QNextConfig

if TYPE_CHECKING:
    from vllm_ext.cpu_kernels import CpuKernels
    from vllm_ext.gpu_kernels import GpuKernels

KERNELS_RAN: set[str] = set()
"""``"phase: convolution, delta rule"`` of everything that has served in this process."""


def record(what: str) -> None:
    KERNELS_RAN.add(what)


def select_kernels(dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> "CpuKernels | GpuKernels":
    """The kernels for a layer whose rank holds ``dims``."""
    if current_platform.is_cpu():
        from vllm_ext.cpu_kernels import CpuKernels

        return CpuKernels(dims, vllm_config)
    from vllm_ext.gpu_kernels import GpuKernels

    return GpuKernels(dims, vllm_config)


def choose_gemms(model: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> None:
    """Which matrix products serve ``model``, where that is not vLLM's choice; called before weights are loaded."""
    if current_platform.is_cpu():
        from vllm_ext import cpu_gemm

        cpu_gemm.choose_gemms(model, config, vllm_config)


def choose_draft_head(head: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Whether a draft keeps a head of its own; called before weights are loaded."""
    if not current_platform.is_cpu():
        return False
    from vllm_ext import cpu_gemm

    return cpu_gemm.choose_draft_head(head, config, vllm_config)


def split_heads(dims: GatedDeltaNetDims, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``q, k [num_tokens, num_k_heads, head_k_dim]`` and ``v [num_tokens, num_v_heads, head_v_dim]``."""
    q, k, v = mixed.split([dims.key_dim, dims.key_dim, dims.value_dim], dim=-1)
    return (
        q.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        k.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)),
        v.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)),
    )
