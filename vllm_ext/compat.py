"""Everything that depends on the version of vLLM: version branches, and our replacements in it (``REPLACEMENTS``).

It imports nothing else of this package: strings name our functions, which are imported where they are needed.
"""

import copy
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.mamba import abstract
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends import gdn_attn

from qnext_plugin.ops.instructions import multiplies_codes
from qnext_plugin.replacements import Feature, Replacement, install


def has_fused_mtp_decode() -> bool:
    """Return whether this vLLM has the CUDA kernel that fuses all from the convolution's to the gated norm's output."""
    return hasattr(torch.ops._C, "fused_gdn_decode_post_conv_mtp")


def prefill_checkpoint_alignment() -> int | None:
    """Return the number of tokens at whose multiples FlashInfer's prefill returns states; None before vLLM 0.33."""
    return getattr(gdn_attn, "FLASHINFER_GDN_CHECKPOINT_ALIGNMENT", None)


def checkpoint_grid(vllm_config: VllmConfig) -> int | None:
    """Return the number of tokens at whose multiples vLLM 0.33 asks for states in the middle of a prompt.

    Return None if a layer of the model cannot return them.
    """
    if abstract.get_mamba_prefill_checkpoint_alignment(vllm_config) is None:
        return None
    return int(abstract.get_mamba_prefill_checkpoint_grid(vllm_config))


def has_cpu_wna16() -> bool:
    """Return whether this build's CPU operators have the product with 4-bit weights; the AVX2 build does not.

    Can go when vLLM 0.33's ``CPUWNA16LinearKernel.can_implement`` checks for it.
    """
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


class KeepsBlockSize(VerifyAndUpdateConfig):
    """A configuration check that makes vLLM cut prompts only at the ends of its cache's blocks.

    An engine process enlarges its blocks to hold a recurrent state. Then vLLM sets up the configuration again, which on
    a CPU resets the block size to its default, unless the user has set one. The scheduler would cut prompts at
    multiples of the default, and states would be cached under wrong positions. Fixed in vLLM 0.33: can go when support
    of 0.32 ends.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        cache_config = vllm_config.cache_config
        if current_platform.is_cpu() and not cache_config.user_specified_block_size:
            cache_config.block_size, cache_config.user_specified_block_size = 128, True


def experts_config(vllm_config: VllmConfig) -> AbstractContextManager[Any]:
    """Return a context to build routed experts in that hides LoRA on CPUs, where vLLM would choose a Triton kernel.

    Can go when ``select_unquantized_moe_backend`` checks the platform first.
    """
    if vllm_config.lora_config is None or not current_platform.is_cpu():
        return nullcontext()
    view = copy.copy(vllm_config)
    view.lora_config = None
    return set_current_vllm_config(view)


class ReloadSession:
    """The record that vLLM 0.32 and 0.33 keep of each module while a serving model is loaded again."""

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
        """Return whether the session is open and nothing has been loaded in it yet."""
        return all(info.can_load() and not info.load_numel for _, info in self._modules())

    @property
    def needed(self) -> bool:
        """Return whether a session must be opened: weights are packed, as always on CPU, and none is open."""
        recorded = any(any(info.restore_metadata) for _, info in self._modules())
        return current_platform.is_cpu() and recorded and not self.is_open

    def open(self) -> None:
        self._layerwise.initialize_layerwise_reload(self._model)

    def close(self) -> None:
        self._layerwise.finalize_layerwise_reload(self._model, get_current_vllm_config().model_config)

    def abandon(self) -> bool:
        """Put the old tensors of unfinished modules back; return whether this restores every module."""
        modules = self._modules()
        unfinished = [(module, info) for module, info in modules if info.can_load()]
        for module, info in unfinished:
            self._layerwise._place_kernel_tensors(module, info)
            info.reset()
        return len(unfinished) == len(modules)


def lacks_bfloat16() -> bool:
    """Return whether this is a CPU without bfloat16 product instructions; Numba compiles our products for it."""
    return current_platform.is_cpu() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def on_cpu(feature: str, is_used: Callable[[VllmConfig], object] = lambda config: True) -> Feature:
    return Feature(f"{feature} on CPUs", lambda config: current_platform.is_cpu() and bool(is_used(config)))


LORA = Feature("LoRA", lambda config: config.lora_config is not None)
PARTIAL_HITS = {
    runner: Feature(
        "prefix hits below a block (--prefix-match-unit)",
        lambda config, v2=v2: config.cache_config.prefix_match_unit is not None and config.use_v2_model_runner == v2,
    )
    for runner, v2 in (("gpu_model_runner", False), ("gpu.model_runner", True))
}
DRAFTS = Feature("speculation", lambda config: config.speculative_config is not None)
DRAFTS_ON_V2 = Feature("speculation", lambda config: DRAFTS.is_used(config) and config.use_v2_model_runner)
DRAFTS_ON_CPU = on_cpu("speculation", DRAFTS.is_used)
LORA_ON_CPU = on_cpu("LoRA", LORA.is_used)
REQUESTS_ON_CPU = on_cpu("requests with a seed")
UPDATES_ON_CPU = on_cpu("weight updates")
# Our products are compiled by Numba, and vLLM finds n-grams with it.
NUMBA_ON_CPU = on_cpu("Numba", lambda config: "llvmlite" in sys.modules or lacks_bfloat16() or multiplies_codes())
EXPERTS_ON_CPU = on_cpu("expert parallelism", lambda config: config.parallel_config.enable_expert_parallel)
RANKS_ON_CPU = on_cpu("data parallelism", lambda config: config.parallel_config.data_parallel_size > 1)
STAGES_ON_CPU = on_cpu("pipeline parallelism", lambda config: config.parallel_config.pipeline_parallel_size > 1)
MTP_STAGES_ON_CPU = on_cpu(
    "MTP with pipeline parallelism", lambda config: DRAFTS.is_used(config) and STAGES_ON_CPU.is_used(config)
)
# The user gives the executor as a class or by its name.
RAY_ON_CPU = on_cpu("Ray", lambda config: "CpuRayExecutor" in str(config.parallel_config.distributed_executor_backend))

KERNEL_LOOKUP = Replacement(
    NUMBA_ON_CPU,
    target="llvmlite.binding.ffi:lib._fntab[__dict__]",
    ours="vllm_ext.cpu.repairs:NO_ATTRIBUTES",
    why="to register kernels vLLM asks every object for its __dict__, which llvmlite's library takes for a function of "
    "its own: no kernel can be registered, and no second engine starts in the process",
    until="either knows better",
    kind="set",
)
REPLACEMENTS = (
    Replacement(
        LORA,
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        ours="vllm_ext.lora:load_adapter",
        why="a model does not see an adapter before it is used, and its rows are not in the order of our weights",
        until="SupportsLoRA has a method that is called with each adapter",
        kind="around",
        parameters=("lora_request",),
    ),
    Replacement(
        LORA,
        target="vllm.v1.worker.gpu_worker:Worker.add_lora",
        ours="vllm_ext.lora:add_adapter",
        why="of several ranks that refuse an adapter the executor reads the first, and takes the others' errors for "
        "answers to later calls; after ten refusals a rank waits forever",
        until="MultiprocExecutor.collective_rpc reads every rank's answer before it raises",
        kind="around",
        parameters=("lora_request",),
    ),
    *(
        Replacement(
            feature,
            target=f"vllm.v1.worker.{runner}:copy_kv_cache_blocks_inplace",
            ours="vllm_ext.state:copy_blocks",
            why="of the layers that share a page it copies the first, and a state is smaller than keys and values",
            until="it copies the largest view of a page",
            kind="around",
            parameters=("kv_caches",),
        )
        for runner, feature in PARTIAL_HITS.items()
    ),
    Replacement(
        REQUESTS_ON_CPU,
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        ours="vllm_ext.cpu.repairs:sample_tokens",
        why="a request with a seed ends the engine if its prompt is computed in pieces",
        until="GPUModelRunner._bookkeeping_sync does not set back the generator of a CPU",
        kind="around",
        parameters=("grammar_output",),
    ),
    Replacement(
        UPDATES_ON_CPU,
        target="vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
        "UnquantizedFusedMoEMethod._setup_kernel",
        ours="vllm_ext.cpu.repairs:setup_expert_kernel",
        why="new weights of experts are put in the place of packed ones without being packed",
        until="UnquantizedFusedMoEMethod._setup_kernel packs on every call",
        kind="around",
        parameters=("layer", "w13", "w2"),
    ),
    Replacement(
        LORA_ON_CPU,
        target="vllm.lora.layers:FusedMoEWithLoRA.can_replace_layer",
        ours="vllm_ext.cpu.repairs:declines_layer",
        why="the wrapper of routed experts ends the start where their kernel has no LoRA, instead of declining",
        until="FusedMoEWithLoRA.can_replace_layer asks the kernel",
        parameters=("source_layer",),
    ),
    Replacement(
        LORA_ON_CPU,
        target="vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU._apply_shrink",
        ours="vllm_ext.cpu.repairs:shrink",
        why="in a batch with adapters, requests without one get that of the last slot",
        until="support of vLLM 0.32 ends; 0.33 leaves them alone",
        kind="around",
        parameters=("y", "x", "w_t_all", "scale"),
    ),
    *(
        Replacement(
            feature,
            target=f"vllm.v1.attention.backends.gdn_attn:GDNAttentionMetadataBuilder.{method}",
            ours=f"vllm_ext.placeholders:{ours}",
            why="a prompt of one token that joins others is scheduled with placeholders for drafts, and so goes on "
            "from the state that the last user of its slot has left",
            until="GDNAttentionMetadataBuilder.build takes no first step for one that verifies drafts",
            kind="around",
            parameters=parameters,
        )
        for feature, method, ours, parameters in (
            (DRAFTS, "build", "build_metadata", ("common_attn_metadata",)),
            (DRAFTS_ON_V2, "update_block_table", "update_block_table", ("metadata",)),
        )
    ),
    Replacement(
        DRAFTS_ON_V2,
        target="vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState.prepare_attn",
        ours="vllm_ext.placeholders:prepare_attn",
        why="a prompt of one token that joins others is computed with the placeholders for its drafts",
        until="GPUModelRunner runs every row with placeholders as one that verifies drafts",
        kind="around",
        parameters=("input_batch",),
    ),
    KERNEL_LOOKUP,
    Replacement(
        DRAFTS_ON_CPU,
        target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        ours="vllm_ext.cpu.repairs:apply_top_k_only",
        why="it takes the largest k, which ends the engine in a step that had no room for drafts",
        until="it takes logits of no rows",
        kind="around",
        parameters=("logits", "k"),
    ),
    Replacement(
        EXPERTS_ON_CPU,
        target="vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply",
        ours="vllm_ext.cpu.repairs:apply_experts",
        why="the kernel of experts takes their global numbers for local ones, and reads past its weights",
        until="CPUUnquantizedExperts.apply looks at expert_map",
        kind="around",
        parameters=("topk_weights", "topk_ids", "expert_map"),
    ),
    Replacement(
        RANKS_ON_CPU,
        target="vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.all_gatherv",
        ours="vllm_ext.cpu.repairs:all_gatherv",
        why="ranks with different numbers of tokens cannot exchange them for the experts",
        until="CpuCommunicator has this method",
        parameters=("input_", "dim", "sizes"),
    ),
    Replacement(
        RANKS_ON_CPU,
        target="vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.reduce_scatterv",
        ours="vllm_ext.cpu.repairs:reduce_scatterv",
        why="ranks with different numbers of tokens cannot exchange them for the experts",
        until="CpuCommunicator has this method",
        parameters=("input_", "dim", "sizes"),
    ),
    Replacement(
        STAGES_ON_CPU,
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sync_and_gather_intermediate_tensors",
        ours="vllm_ext.cpu.pipelines:gather_intermediate_tensors",
        why="later stages have no buffer for what they receive, unless a compiled model was warmed up",
        until="CPUModelRunner.warming_up_model also runs eagerly",
        kind="around",
        parameters=("num_tokens", "intermediate_tensors"),
    ),
    Replacement(
        MTP_STAGES_ON_CPU,
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_attn_backend",
        ours="vllm_ext.cpu.pipelines:initialize_attn_backend",
        why="stages before the last look for a draft that only the last has",
        until="CPUs without Triton get vLLM's second model runner",
        kind="around",
        parameters=("kv_cache_config",),
    ),
    Replacement(
        MTP_STAGES_ON_CPU,
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        ours="vllm_ext.cpu.pipelines:update_states",
        why="stages before the last do not know how many drafts were accepted",
        until="CPUs without Triton get vLLM's second model runner",
        kind="around",
        parameters=("scheduler_output",),
    ),
    Replacement(
        RAY_ON_CPU,
        target="vllm.platforms.cpu:CpuPlatform.ray_device_key",
        ours="vllm_ext.cpu.ray_executor:DEVICE_KEY",
        why="the CPU platform names no resource of Ray to place workers by",
        until="CpuPlatform.ray_device_key is set",
        kind="set",
    ),
    Replacement(
        RAY_ON_CPU,
        target="vllm.v1.executor.ray_executor_v2:RayWorkerProc",
        ours="vllm_ext.cpu.ray_executor:CpuRayWorker",
        why="a worker asks Ray for its GPUs",
        until="CpuPlatform.ray_device_key is set",
        kind="set",
    ),
)


def apply(vllm_config: VllmConfig) -> None:
    """Install the replacements that this configuration needs; idempotent. Raise ``RuntimeError`` if one fails."""
    install(REPLACEMENTS, vllm_config, "vLLM", vllm.__version__)


def prepare_numba(vllm_config: VllmConfig) -> None:
    """Prepare for Numba before vLLM's workers start, when our model is not built yet; idempotent.

    With OpenMP's threads, which it takes by default, Numba would set their number to that of all cores, for torch as
    well: more than are bound to a worker. So n-grams are found by threads of its own.
    """
    if getattr(vllm_config.speculative_config, "method", None) == "ngram" and current_platform.is_cpu():
        os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    if "llvmlite" in sys.modules:
        install((KERNEL_LOOKUP,), vllm_config, "vLLM", vllm.__version__)
