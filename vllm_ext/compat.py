"""Everything that depends on the version of vLLM: repairs of what its CPU backend lacks.

A repair is applied when a model that needs it is built, checks that its target is what it expects, and leaves GPUs
alone. Each says when it can go.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_ext.patching import replace


def has_fused_mtp_decode() -> bool:
    """Whether this build of vLLM has the CUDA kernel from the convolution's output to the gated norm's."""
    return hasattr(torch.ops._C, "fused_gdn_decode_post_conv_mtp")


def has_cpu_wna16() -> bool:
    """Whether the CPU operators of this build have the product with weights of four bits: the AVX2 build does not.

    Can go when vLLM 0.33's ``CPUWNA16LinearKernel.can_implement`` asks for it.
    """
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


class KeepsBlockSize(VerifyAndUpdateConfig):
    """Keeps vLLM from cutting prompts elsewhere than at the ends of its cache's blocks.

    After an engine process has enlarged its blocks to hold a recurrent state, vLLM sets up the configuration again, and
    on a CPU the block size is back at its default, unless it is the user's. The scheduler then cuts prompts at that
    one's multiples, and states are cached as those of positions that they are not at. Mended in vLLM 0.33: can go with
    the support of 0.32.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        cache_config = vllm_config.cache_config
        if current_platform.is_cpu() and not cache_config.user_specified_block_size:
            cache_config.block_size, cache_config.user_specified_block_size = 128, True


def repair_cpu_backend(vllm_config: VllmConfig) -> None:
    """Make this configuration run on a CPU, where vLLM 0.32 and 0.33 have gaps; idempotent."""
    if not current_platform.is_cpu():
        return
    from vllm_ext.cpu import repairs_parallel as compat_parallel

    _seeded_prompts_in_pieces()
    _experts_loaded_again()
    if vllm_config.lora_config is not None:
        _experts_without_adapters()
        _requests_without_adapters()
    if vllm_config.speculative_config is not None:
        from vllm_ext.cpu import triton as cpu_triton

        cpu_triton.register()
        _first_steps_with_drafts()
    compat_parallel.repair(vllm_config)


@cache
def prepare_adapters() -> None:
    """Show a model with ``prepare_adapter`` each LoRA adapter once it is read, before anything of it is used.

    Can go when vLLM's ``SupportsLoRA`` has such a method.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    def load(original: Callable[..., Any], self: Any, lora_request: Any) -> Any:
        adapter = original(self, lora_request)
        show(self._adapter_manager.model, adapter)
        return adapter

    def show(model: Any, adapter: Any) -> None:
        if hasattr(model, "prepare_adapter"):
            model.prepare_adapter(adapter)

    replace(WorkerLoRAManager, "_load_adapter", load, ("lora_request",))


def experts_config(vllm_config: VllmConfig) -> AbstractContextManager[Any]:
    """The configuration to build routed experts in: with LoRA vLLM takes a Triton kernel for them, also on a CPU.

    Can go when ``select_unquantized_moe_backend`` asks for the platform first.
    """
    if vllm_config.lora_config is None or not current_platform.is_cpu():
        return nullcontext()
    view = copy.copy(vllm_config)
    view.lora_config = None
    return set_current_vllm_config(view)


@cache
def _experts_without_adapters() -> None:
    """With LoRA, vLLM's wrapper of routed experts ends the start where their kernel has no LoRA; here it declines.

    Can go when ``FusedMoEWithLoRA.can_replace_layer`` asks the kernel.
    """
    from vllm.lora.layers import FusedMoEWithLoRA

    replace(FusedMoEWithLoRA, "can_replace_layer", lambda original, **kwargs: False, ("source_layer",))


@cache
def _requests_without_adapters() -> None:
    """In a batch with adapters, requests without one get that of the last slot: their index there is -1.

    Mended in vLLM 0.33: can go with the support of 0.32.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def shrink(original: Callable[..., None], self: Any, y: torch.Tensor, *args: Any) -> None:
        original(self, y, *args)
        y.masked_fill_((self.token_lora_indices < 0)[:, None], 0)

    replace(PunicaWrapperCPU, "_apply_shrink", shrink, ("y", "x", "w_t_all", "scale"))


class ReloadSession:
    """What vLLM 0.32 and 0.33 record, module by module, while a model that serves is loaded again."""

    def __init__(self, model: nn.Module) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        self._layerwise, self._model = layerwise, model

    def _modules(self) -> list[tuple[nn.Module, Any]]:
        return [(module, self._layerwise.get_layerwise_info(module)) for module in self._model.modules()]

    @property
    def is_open(self) -> bool:
        return any(info.can_load() for _, info in self._modules())

    @property
    def untouched(self) -> bool:
        """Whether nothing has been loaded since it was opened."""
        return all(info.can_load() and not info.load_numel for _, info in self._modules())

    @property
    def needed(self) -> bool:
        """Whether none is open on a model whose weights are packed, as they always are on CPU."""
        recorded = any(any(info.restore_metadata) for _, info in self._modules())
        return current_platform.is_cpu() and recorded and not self.is_open

    def open(self) -> None:
        self._layerwise.initialize_layerwise_reload(self._model)

    def close(self) -> None:
        self._layerwise.finalize_layerwise_reload(self._model, get_current_vllm_config().model_config)

    def abandon(self) -> bool:
        """Put the old tensors of unfinished modules back; returns whether that is all of them."""
        modules = self._modules()
        unfinished = [(module, info) for module, info in modules if info.can_load()]
        for module, info in unfinished:
            self._layerwise._place_kernel_tensors(module, info)
            info.reset()
        return len(unfinished) == len(modules)


@cache
def _experts_loaded_again() -> None:
    """New weights of experts are put in the place of packed ones without being packed.

    Can go when ``UnquantizedFusedMoEMethod._setup_kernel`` packs on every call.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def setup(original: Callable[..., None], self: Any, layer: nn.Module, w13: Any, w2: Any) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    replace(UnquantizedFusedMoEMethod, "_setup_kernel", setup, ("layer", "w13", "w2"))


@cache
def _seeded_prompts_in_pieces() -> None:
    """A request with a seed ends the engine if its prompt is computed in pieces: after each piece but the last its
    random generator is set back, which those of a CPU cannot be. Here the sampler does not draw from it in between.

    Can go when ``GPUModelRunner._bookkeeping_sync`` does not set back a CPU generator.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        held = {i: generators.pop(i) for i in unfinished if i in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(held)

    replace(GPUModelRunner, "sample_tokens", sample_tokens, ("grammar_output",))


@cache
def _first_steps_with_drafts() -> None:
    """A prompt of one token that joins others is scheduled with placeholders for drafts, and so goes on from the state
    that the last user of its slot has left. Here that slot is emptied first.

    Can go when ``GDNAttentionMetadataBuilder.build`` takes no first step for one that verifies drafts.
    """
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder

    def build(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata, batch = original(self, *args, **kwargs), signature.bind(self, *args, **kwargs).arguments
        batch = batch["common_attn_metadata"]
        if metadata.num_spec_decodes:
            first = batch.seq_lens_cpu_upper_bound <= batch.query_start_loc_cpu.diff()
            slots = metadata.spec_state_indices_tensor[first[metadata.spec_sequence_masks], 0]
            layers = self.vllm_config.compilation_config.static_forward_context
            for state in (state for name in self.layer_names if len(slots) for state in layers[name].kv_cache):
                state[slots] = 0
        return metadata

    signature = replace(GDNAttentionMetadataBuilder, "build", build, ("common_attn_metadata",))


@cache
def compiled_products() -> Any:
    """``qnext_plugin.ops.cpu.operators``, which loads Numba, and so llvmlite.

    When it registers kernels, vLLM asks every object for its ``__dict__``. Llvmlite's library takes that
    for a function of its own, and no second engine starts in the process. Can go when either knows better.
    """
    from llvmlite.binding import ffi

    from qnext_plugin.ops.cpu import operators

    ffi.lib._fntab.setdefault("__dict__", {})
    return operators
