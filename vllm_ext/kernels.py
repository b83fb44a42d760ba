"""Which kernels serve a Gated DeltaNet layer.

======  =======================================================  ==================================================
device  condition                                                serves
======  =======================================================  ==================================================
GPU     float32 prefill, which vLLM's backends refuse            ``qnext_plugin.ops`` behind vLLM's convolution
GPU     prefill, K and V under different powers of two           the same: vLLM's preparation does not compile there
GPU     otherwise                                                ``gpu_kernels``: vLLM's Triton, CUDA and FlashInfer
CPU     convolution: bfloat16, width 4, AVX512-BF16 or Arm bf16  ``cpp``: vLLM's C++ convolution
CPU     delta rule: bfloat16, K = V in (64, 128)                 ``cpp``: vLLM's C++ delta rule
CPU     that of prompts on x86 without AVX512                    ``torch``, in a ninth of the time of vLLM's
CPU     otherwise, each on its own                               ``torch``: ``qnext_plugin.ops``, any dtype and size
======  =======================================================  ==================================================

Matrix products are vLLM's choice, but for bfloat16 on CPUs with AVX512-BF16 and without AMX, and on CPUs with AVX2 and
nothing for bfloat16 (``gemm``).
"""

from typing import TYPE_CHECKING

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn  # noqa: F401  registers the op that calls us
from vllm.platforms import current_platform

from qnext_plugin.config import GatedDeltaNetDims, QNextConfig

if TYPE_CHECKING:
    from vllm_ext.cpu.gated_delta_net import CpuKernels
    from vllm_ext.gpu_kernels import GpuKernels


def select_kernels(dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> "CpuKernels | GpuKernels":
    """The kernels for a layer whose rank holds ``dims``."""
    if current_platform.is_cpu():
        from vllm_ext.cpu.gated_delta_net import CpuKernels

        return CpuKernels(dims, vllm_config)
    from vllm_ext.gpu_kernels import GpuKernels

    return GpuKernels(dims, vllm_config)


def register_cpu_kernels(vllm_config: VllmConfig) -> None:
    """Give vLLM what it has no implementation of on a CPU, by its own extension point; idempotent."""
    if current_platform.is_cpu() and vllm_config.speculative_config is not None:
        from vllm_ext.cpu import triton

        triton.register()


def choose_gemms(model: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> None:
    """Which matrix products serve ``model``, where that is not vLLM's choice; called before weights are loaded."""
    if current_platform.is_cpu():
        from vllm_ext.cpu import gemm

        gemm.choose_gemms(model, config, vllm_config)


def choose_draft_head(head: nn.Module, config: QNextConfig, vllm_config: VllmConfig) -> bool:
    """Whether a draft keeps a head of its own; called before weights are loaded."""
    if not current_platform.is_cpu():
        return False
    from vllm_ext.cpu import gemm

    return gemm.choose_draft_head(head, config, vllm_config)
