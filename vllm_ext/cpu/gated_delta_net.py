"""Selects the CPU kernels of each phase (``phases``): vLLM's in C++ where they serve, else ours or torch."""

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from qnext_plugin import ops
from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.kernel_log import record
from qnext_plugin.ops.instructions import multiplies_codes
from vllm_ext.cpu.phases import CppConv, CppDelta, Drafts, Prefills, TorchConv, TorchDelta
from vllm_ext.state import DeltaNetLayer, state_dtypes


def cpp_conv_obstacle(dims: GatedDeltaNetDims, dtype: torch.dtype) -> str:
    """Return why vLLM's C++ convolution cannot serve; "" where it can."""
    arm = current_platform.get_cpu_architecture() == CpuArchEnum.ARM
    has_bf16 = torch.cpu.get_capabilities().get("bf16", False) if arm else torch.cpu._is_avx512_bf16_supported()
    obstacles = {
        f"it takes bfloat16, not {dtype}": dtype != torch.bfloat16,
        f"it takes width 4, not {dims.conv_kernel_size}": dims.conv_kernel_size != 4,
        "it wants the channels of the cache last": is_conv_state_dim_first(),
        f"this CPU has no {'bfloat16 instructions' if arm else 'AVX512-BF16'}": not has_bf16,
    }
    return "; ".join(text for text, holds in obstacles.items() if holds)


def cpp_delta_obstacle(dims: GatedDeltaNetDims, dtype: torch.dtype) -> str:
    """Return why vLLM's C++ delta rule cannot serve; "" where it can."""
    k, v = dims.head_k_dim, dims.head_v_dim
    obstacles = {
        f"it takes bfloat16, not {dtype}": dtype != torch.bfloat16,
        f"it takes heads of 64 or 128, not {k} and {v}": k != v or k not in (64, 128),
    }
    return "; ".join(text for text, holds in obstacles.items() if holds)


def cpp_prefill_obstacle(dims: GatedDeltaNetDims, dtype: torch.dtype) -> str:
    """Return why vLLM's C++ delta rule does not serve prompts; "" where it does."""
    slow = current_platform.get_cpu_architecture() == CpuArchEnum.X86 and not torch.cpu._is_avx512_supported()
    return cpp_delta_obstacle(dims, dtype) or ("without AVX512 it takes nine times as long" if slow else "")


def select_conv(vllm_config: VllmConfig) -> TorchConv:
    """Return the convolution where vLLM's does not serve."""
    dtypes = {vllm_config.model_config.dtype, state_dtypes(vllm_config)[0]}
    if dtypes != {torch.bfloat16} or is_conv_state_dim_first() or not multiplies_codes():
        return TorchConv()
    from vllm_ext.cpu.compiled_conv import CompiledConv  # it imports Numba, which only some CPUs need

    return CompiledConv() if CompiledConv.available() else TorchConv()


class CpuKernels:
    """The kernels of Gated DeltaNet layers on CPUs: a convolution and a delta rule for each phase, then one norm."""

    checkpoint_alignment = checkpoint_grid = None  # they return no states in the middle of a prompt

    def __init__(self, dims: GatedDeltaNetDims, vllm_config: VllmConfig) -> None:
        dtype = vllm_config.model_config.dtype
        self.conv_obstacle = cpp_conv_obstacle(dims, dtype)
        self.conv = select_conv(vllm_config) if self.conv_obstacle else CppConv()
        step, prefill = cpp_delta_obstacle(dims, dtype), cpp_prefill_obstacle(dims, dtype)
        self.delta_obstacles = {"prefill": prefill, "decode": step, "verify": step}
        self.delta = {phase: TorchDelta() if why else CppDelta() for phase, why in self.delta_obstacles.items()}

    def name(self, phase: str) -> str:
        return f"{self.conv.name}, {self.delta[phase].name}"

    def describe(self) -> dict[str, tuple[str, str]]:
        """Return for each phase the name that ``record`` will get, and why no faster kernel serves."""
        found = {}
        for phase, obstacle in self.delta_obstacles.items():
            obstacles = {"convolution": self.conv_obstacle, "delta rule": obstacle}
            reason = "; ".join(f"no C++ {what}: {why}" for what, why in obstacles.items() if why)
            found[phase] = (self.name(phase), reason)
        return found

    def prepare_weights(self, layer: DeltaNetLayer) -> None:
        self.conv.prepare_weights(layer)

    def warm_up(self, layer: DeltaNetLayer, mixed_qkvz: Tensor, ba: Tensor) -> None:
        pass

    def run(
        self,
        layer: DeltaNetLayer,
        metadata: GDNAttentionMetadata,
        qkv: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
    ) -> None:
        if metadata.spec_sequence_masks is None:
            d = metadata.num_decode_tokens
            verify, decode, prefill = None, slice(0, d), slice(d, None)
        elif metadata.num_prefills:
            verify, decode, prefill = metadata.spec_token_indx, None, metadata.non_spec_token_indx
        else:
            verify, decode, prefill = slice(None), None, None

        def finish(rows: slice | Tensor, core: Tensor, phase: str) -> None:
            out[rows] = ops.rms_norm_gated(core, z[rows], layer.norm.weight[: layer.head_v_dim], layer.norm.eps)
            record(f"{phase}: {self.name(phase)}")

        # The slots are columns of a block table, and the C++ kernels assume that they are contiguous.
        if metadata.num_spec_decodes:
            drafts = Drafts.of(metadata)
            mixed = self.conv.verify(layer, qkv[verify], drafts)
            finish(verify, self.delta["verify"].verify(layer, mixed, b[verify], a[verify], drafts), "verify")
        if metadata.num_decodes:
            slots = metadata.non_spec_state_indices_tensor[: metadata.num_decodes].contiguous()
            mixed = self.conv.decode(layer, qkv[decode], slots)
            finish(decode, self.delta["decode"].decode(layer, mixed, b[decode], a[decode], slots), "decode")
        if metadata.num_prefills:
            n = metadata.num_prefills
            batch = Prefills(
                metadata.prefill_state_indices[:n].contiguous(),
                metadata.prefill_has_initial_state[:n],
                metadata.prefill_query_start_loc[: n + 1],
            )
            mixed = self.conv.prefill(layer, qkv[prefill], batch)
            finish(prefill, self.delta["prefill"].prefill(layer, mixed, b[prefill], a[prefill], batch), "prefill")
