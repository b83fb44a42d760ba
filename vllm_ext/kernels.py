"""Selects the kernels that serve a Gated DeltaNet layer.

======  =======================================================  ==================================================
device  condition                                                kernels
======  =======================================================  ==================================================
GPU     float32 prefill, which vLLM's backends refuse            ``qnext_plugin.ops`` after vLLM's convolution
GPU     prefill, next powers of two of K and V differ            as above: vLLM's preparation does not compile
GPU     otherwise                                                ``gpu_kernels``: vLLM's Triton, CUDA and FlashInfer
CPU     convolution: bfloat16, width 4, AVX512-BF16 or Arm bf16  ``cpp``: vLLM's C++ convolution
CPU     delta rule: bfloat16, K = V in (64, 128)                 ``cpp``: vLLM's C++ delta rule
CPU     delta rule of prompts on x86 without AVX512              ``torch``, which takes a ninth of vLLM's time
CPU     otherwise, convolution and delta rule separately         ``torch``: ``qnext_plugin.ops``, any dtype and size
======  =======================================================  ==================================================

vLLM chooses the matrix products, except those in bfloat16 on CPUs with AVX512-BF16 but no AMX, and on CPUs with AVX2
but no bfloat16 instructions (``cpu.gemm``).
"""

from typing import TYPE_CHECKING

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn  # noqa: F401  registers the op that calls us
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from qnext_plugin.config import GatedDeltaNetDims, QNextConfig

if TYPE_CHECKING:
    from vllm_ext.cpu.gated_delta_net import CpuKernels
    from vllm_ext.gpu_kernels import GpuKernels


def select_kernels(dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> "CpuKernels | GpuKernels":
    """Return the kernels for a layer; ``dims`` are the sizes on this rank."""
    if current_platform.is_cpu():
        from vllm_ext.cpu.gated_delta_net import CpuKernels

        return CpuKernels(dims, vllm_config)
    from vllm_ext.gpu_kernels import GpuKernels

    return GpuKernels(dims, vllm_config)


def register_cpu_kernels(vllm_config: VllmConfig) -> None:
    """Register the kernels that vLLM lacks on CPUs without Triton, through vLLM's extension point; idempotent."""
    if current_platform.is_cpu() and not HAS_TRITON and vllm_config.speculative_config is not None:
        from vllm_ext.cpu import triton

        triton.register()


def choose_gemms(model: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> None:
    """Choose the matrix products of ``model`` where we replace vLLM's choice; call before weights are loaded."""
    if current_platform.is_cpu():
        from vllm_ext.cpu import gemm

        gemm.choose_gemms(model, config, vllm_config)


def choose_draft_head(head: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Give a draft its own int8 head where possible, and return whether it has one; call before weights are loaded."""
    if not current_platform.is_cpu():
        return False
    from vllm_ext.cpu import gemm

    return gemm.choose_draft_head(head, config, vllm_config)
