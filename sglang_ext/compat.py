"""Everything that depends on the version of SGLang: version branches, and our replacements in it (``REPLACEMENTS``).

It imports nothing else of this package: strings name our functions, which are imported where they are needed.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sglang.srt.platforms import current_platform
from sglang.version import __version__

from qnext_plugin.ops.packages import CHOICES
from qnext_plugin.replacements import Feature, Replacement, install

ON_CPU: bool = current_platform.device_type == "cpu"
"""True if this process computes on a CPU, and so with our kernels."""


def check_platform() -> None:
    """Raise ``ValueError`` if this process computes on a CPU without the platform that provides our kernels."""
    if ON_CPU and type(current_platform).__module__ != "sglang_ext.cpu.platform":
        raise ValueError(
            f"the platform is {type(current_platform).__name__}, expected qnext-plugin's own to compute on this CPU; "
            "unset SGLANG_USE_CPU_ENGINE and SGLANG_PLATFORM, or set QNEXT_DISABLE=1 to serve SGLang's own model"
        )


def unpadded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's values as the checkpoint has them.

    On CPUs SGLang 0.5.23 pads sizes in place for its AMX kernels (``adjust_config_with_unaligned_cpu_tp``) and keeps
    the originals beside them. Can go when that leaves out-of-tree platforms alone.
    """
    prefix = "original_"
    originals = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if "total_num_kv_heads" in originals:
        originals["num_key_value_heads"] = originals.pop("total_num_kv_heads")
    return values | {name: value for name, value in originals.items() if name in values}


def bind_topk(topk: Any, experts: Any) -> None:
    """Tell the router which kernels run the experts, because it prepares their input.

    SGLang 0.5.22 reads the server's arguments instead. The check can go when its support ends.
    """
    if hasattr(topk, "bind_runner_backend"):
        topk.bind_runner_backend(experts.runner_backend, routing_method_type=experts.routing_method_type)


def route(topk: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, forward_batch: Any, draft: bool) -> Any:
    """Return each token's experts, by the places where a load balancer has put them, and none for rows of padding.

    SGLang 0.5.22 leaves both to the model. ``topk`` alone is enough when its support ends.
    """
    if hasattr(topk, "bind_runner_backend"):
        return topk(hidden_states, router_logits)
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    return topk(
        hidden_states,
        router_logits,
        num_token_non_padded=None if ON_CPU else forward_batch.moe_num_token_non_padded(),
        expert_location_dispatch_info=None if draft else ExpertLocationDispatchInfo.init_new(topk.layer_id),
    )


def reads_strided_gates(forward_batch: Any) -> bool:
    """Return whether the kernels of linear attention read this batch's gates by their strides.

    SGLang's kernels for prompts do, and its Triton kernels for drafts. On SGLang 0.5.22 a decode step that is labeled
    as prompts runs the kernels for prompts; ``logical_forward_mode`` is enough when its support ends.
    """
    mode = getattr(forward_batch, "logical_forward_mode", forward_batch.forward_mode)
    if not mode.is_target_verify():
        return bool(mode.is_extend())
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    backend = getattr(backend, "linear_attn_backend", backend)
    # It is said of queries, keys and values; whatever reads those by strides reads the gates so too.
    return bool(getattr(backend, "_use_strided_target_verify_qkv", False))


def pages_experts() -> bool:
    """Return whether experts are fetched from the host when they are needed; SGLang 0.5.22 cannot."""
    from sglang.srt.runtime_context import get_exec

    return bool(getattr(get_exec().moe, "enable_paged_experts", False))


def uses_expert_location(experts: Any) -> bool:
    """Return whether the load balancer places a layer's experts; it does not place those of a draft.

    SGLang 0.5.22 makes no difference between them. The check can go when its support ends.
    """
    return bool(getattr(experts, "uses_expert_location", True))


@dataclass(frozen=True)
class Uses:
    """The features of SGLang that a process uses, as far as replacements depend on them."""

    model: bool = False
    """True if the process builds one of our models."""
    drafts: str = ""
    """The algorithm that drafts, as `config.drafting` names it; empty without drafts."""
    adapters: bool = False
    quantization: bool = False
    """True if the process reads the configuration of a quantized checkpoint."""
    packages: tuple[str, ...] = ()
    """The packages whose kernels compute prompts, as `qnext_plugin.ops.packages` names them."""


@cache
def cannot_pin() -> bool:
    try:
        torch.zeros(1).pin_memory()
    except RuntimeError:
        return True
    return False


UPDATES = Feature("weight updates", lambda uses: uses.model)
REQUESTS = Feature("requests that do not fit the vocabulary", lambda uses: uses.model)
LORA = Feature("LoRA", lambda uses: uses.adapters)
ON_CPUS = Feature("CPUs", lambda uses: ON_CPU and uses.model)
PINNING_ON_CPUS = Feature("CPUs", lambda uses: ON_CPU and uses.model and cannot_pin())
DRAFTS_ON_CPUS = Feature("drafts on CPUs", lambda uses: ON_CPU and bool(uses.drafts))
UNRESERVED_DRAFTS = Feature("drafts at the end of the context", lambda uses: uses.drafts in ("NGRAM", "STANDALONE"))
NGRAM = Feature("NGRAM", lambda uses: uses.drafts == "NGRAM")
NGRAM_ON_CPUS = Feature("NGRAM on CPUs", lambda uses: ON_CPU and uses.drafts == "NGRAM")
PACKAGES = Feature("kernels of other packages", lambda uses: bool(uses.packages))
FLA = Feature("flash-linear-attention", lambda uses: "fla" in uses.packages)
CAUSAL_CONV1D = Feature("causal-conv1d", lambda uses: "causal_conv1d" in uses.packages)
LORA_ON_CPUS = Feature("LoRA on CPUs", lambda uses: ON_CPU and uses.adapters)
QUANTIZATION_ON_CPUS = Feature("quantized checkpoints on CPUs", lambda uses: ON_CPU and uses.quantization)


def guard(method: str, why: str) -> Replacement:
    return Replacement(
        UPDATES,
        target=f"sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.{method}",
        ours=f"sglang_ext.guards:{method}",
        why=why,
        until="SGLang refuses an update before it changes anything",
        kind="around",
    )


def kernel(feature: Feature, target: str, ours: str, *parameters: str) -> Replacement:
    return Replacement(
        feature,
        target=target,
        ours=ours,
        why="it runs on GPUs only",
        until="SGLang lets a platform provide it",
        parameters=parameters,
    )


GDN = "sglang.srt.layers.attention.linear.gdn_backend"
STATES = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"
SPECULATIVE = "sglang.kernels.ops.speculative"
FACTORY = "sglang.srt.speculative.draft_utils:DraftBackendFactory"
OUR_GDN, OUR_DRAFTS = "sglang_ext.cpu.gated_delta_net", "sglang_ext.cpu.speculation"

# No CPU can run the kernels that are replaced, so no other model depends on them.
REPLACEMENTS = (
    guard("begin_weight_update", "a model does not learn where one update ends and the next begins"),
    guard("update_weights_from_ipc", "the same"),
    guard("update_weights_from_disk", "files that do not fit are found when a part of the weights is overwritten"),
    guard("update_weights_from_tensor", "tensors that do not fit end the scheduler process"),
    Replacement(
        REQUESTS,
        target="sglang.srt.managers.scheduler:validate_input_length",
        ours="sglang_ext.guards:validate_request",
        why="ids outside the vocabulary, or more log-probabilities than it has ids, end the scheduler process",
        until="SGLang checks them",
        kind="around",
        parameters=("req",),
    ),
    Replacement(
        LORA,
        target="sglang.srt.lora.lora:LoRAAdapter._process_weight",
        ours="sglang_ext.lora:process_weight",
        why="tensors are sorted by the last parts of their names, so that a draft's pass for those of the first layers",
        until="SGLang lets a model see an adapter first",
        kind="around",
        parameters=("name", "loaded_weight"),
    ),
    Replacement(
        LORA,
        target="sglang.srt.lora.lora:LoRAAdapter._normalize_weights",
        ours="sglang_ext.lora:normalize_weights",
        why="what it has no place for is left out in silence, and rows are not in the order of our weights",
        until="SGLang lets a model see an adapter first",
        kind="around",
    ),
    kernel(ON_CPUS, f"{GDN}:TritonGDNKernel", f"{OUR_GDN}:TorchGDNKernel"),
    kernel(ON_CPUS, f"{GDN}:causal_conv1d_fn", f"{OUR_GDN}:causal_conv1d_fn", "cache_indices", "has_initial_state"),
    kernel(
        ON_CPUS,
        f"{GDN}:causal_conv1d_update",
        f"{OUR_GDN}:causal_conv1d_update",
        "conv_state_indices",
        "intermediate_conv_window",
        "intermediate_state_indices",
        "retrieve_next_token",
        "retrieve_next_sibling",
        "retrieve_parent_token",
    ),
    kernel(ON_CPUS, f"{GDN}:fused_gdn_gating", f"{OUR_GDN}:fused_gdn_gating", "A_log", "a", "b", "dt_bias"),
    *(
        Replacement(
            PACKAGES,
            target=f"sglang.srt.layers.attention.linear.utils:LinearAttnKernelBackend._value2member_map_[{name}]",
            ours="sglang.srt.layers.attention.linear.utils:LinearAttnKernelBackend.TRITON",
            why="SGLang takes a name that it does not know for one that cannot serve",
            until="it lets others name kernels for prompts",
            kind="set",
        )
        for name in CHOICES
    ),
    Replacement(
        FLA,
        target="sglang.srt.layers.attention.linear.kernels.gdn_triton:TritonGDNKernel.extend",
        ours="sglang_ext.gpu_prefill:extend",
        why="SGLang lets others add names of kernels, and no kernels",
        until="it lets others add kernels for prompts",
    ),
    Replacement(
        CAUSAL_CONV1D,
        target=f"{GDN}:GDNAttnBackend._convolve_prefill",
        ours="sglang_ext.gpu_prefill:convolve_prefill",
        why="SGLang has no choice of convolutions",
        until="it has one that others can extend",
    ),
    kernel(ON_CPUS, f"{STATES}:track_mamba_states_all_layers", f"{OUR_GDN}:track_states_all_layers"),
    kernel(ON_CPUS, f"{STATES}:track_mamba_states_if_needed", f"{OUR_GDN}:track_states"),
    kernel(
        ON_CPUS,
        f"{STATES}:scatter_mamba_states_after_mtp_verify",
        f"{OUR_GDN}:commit_states_after_verify",
        "src_indices_raw",
    ),
    Replacement(
        PINNING_ON_CPUS,
        target="torch:Tensor.pin_memory",
        ours="sglang_ext.cpu.repairs:pin_memory",
        why="ScheduleBatch.prepare_for_decode pins without asking whether torch can",
        until="it asks is_pin_memory_available, as its neighbors do",
        kind="set",
    ),
    Replacement(
        PINNING_ON_CPUS,
        target="sglang.srt.mem_cache.pool_host.common:ALLOC_MEMORY_FUNCS[cpu]",
        ours="sglang_ext.cpu.repairs:allocate",
        why="--enable-return-routed-experts pins without asking whether torch can",
        until="it asks is_pin_memory_available, as its neighbors do",
        kind="set",
    ),
    *(
        kernel(DRAFTS_ON_CPUS, f"{SPECULATIVE}.{module}:{function}", f"{OUR_DRAFTS}:{function}")
        for module, function in (
            ("cache_locs", "assign_draft_cache_locs_contiguous_func"),
            ("cache_locs", "fill_front_out_cache_loc_func"),
            ("eagle", "fill_accept_out_cache_loc_func"),
            ("eagle", "fill_bonus_tokens_func"),
            ("gather_spec_extras", "gather_spec_extras"),
            ("spec_tree", "build_tree_kernel_efficient_func"),
            ("spec_tree", "verify_tree_greedy_func"),
        )
    ),
    kernel(
        DRAFTS_ON_CPUS,
        "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
        f"{OUR_DRAFTS}:assign_req_to_token_pool_func",
    ),
    *(
        Replacement(
            DRAFTS_ON_CPUS,
            target=f"{FACTORY}.{method}",
            ours=f"sglang_ext.cpu.attention:{method}",
            why="it knows no attention backend for drafts on this platform",
            until="a platform can name one",
        )
        for method in ("create_decode_backend", "create_draft_extend_backend")
    ),
    *(
        Replacement(
            DRAFTS_ON_CPUS,
            target=f"sglang.srt.speculative.eagle_utils:{function}",
            ours=f"{OUR_DRAFTS}:{function}",
            why="it is None off GPUs, and called when drafts are sampled",
            until="it is not None on a CPU",
            kind="set",
        )
        for function in ("tree_speculative_sampling_target_only", "top_k_renorm_prob", "top_p_renorm_prob")
    ),
    Replacement(
        DRAFTS_ON_CPUS,
        target="sglang.srt.speculative.spec_utils:_select_top_k_tokens_later",
        ours="sglang_ext.cpu.repairs:select_top_k_tokens",
        why="it is compiled, for seconds, while the first request waits",
        until="SGLang does not compile it on CPUs",
        kind="around",
    ),
    Replacement(
        DRAFTS_ON_CPUS,
        target="sglang.srt.mem_cache.allocation:get_last_loc",
        ours="sglang.srt.mem_cache.allocation:get_last_loc_torch",
        why="with pages of several tokens it runs on GPUs only, unless attention is SGLang's torch_native",
        until="SGLang asks the platform",
    ),
    Replacement(
        UNRESERVED_DRAFTS,
        target="sglang.srt.mem_cache.allocation_sizing:get_req_to_token_extra_context_len",
        ours="sglang_ext.guards:extra_context_len",
        why="slots for drafts after the last position are written to the table's row of another request, or end the "
        "scheduler process",
        until="SGLang reserves their positions, as it does for NEXTN",
        kind="around",
    ),
    Replacement(
        NGRAM_ON_CPUS,
        target=f"sys:modules[{SPECULATIVE}.reconstruct_tree]",
        ours=f"{OUR_DRAFTS}:trees",
        why="it cannot be imported without a GPU, and NGRAM's worker reads its trees with it",
        until="SGLang lets a platform provide its function",
        kind="set",
    ),
    Replacement(
        NGRAM,
        target="sglang.srt.speculative.cpp_ngram.ngram_corpus:NgramCorpus.batch_get",
        ours="sglang_ext.guards:ngram_drafts",
        why="it fills trees up with equal drafts, and each of them is accepted with the whole probability of its token",
        until="SGLang fills them up with different tokens",
        kind="around",
    ),
    Replacement(
        NGRAM_ON_CPUS,
        target="sglang.srt.speculative.ngram_worker:USE_FULL_MASK",
        ours=f"{OUR_DRAFTS}:USE_FULL_MASK",
        why="our attention reads which drafts see each other, without the tokens before them",
        until="the worker asks the attention backend, as the others do",
        kind="set",
    ),
    *(
        Replacement(
            LORA_ON_CPUS,
            target=f"sglang.srt.lora.{module}:torch",
            ours="sglang_ext.cpu.repairs:UNPINNED",
            why="it pins memory without asking whether torch can",
            until="it asks is_pin_memory_available",
            kind="set",
        )
        for module in ("layers", "backend.torch_backend")
    ),
    Replacement(
        LORA_ON_CPUS,
        target="sglang.srt.lora.backend.torch_backend:TorchNativeLoRABackend.run_lora_b_sgemm",
        ours="sglang_ext.cpu.repairs:run_lora_b",
        why="ReplicatedLinearWithLoRA leaves an argument out",
        until="it gives output_offset_cpu",
        kind="around",
        parameters=("output_offset_cpu",),
    ),
    Replacement(
        LORA_ON_CPUS,
        target="sglang.srt.lora.mem_pool:LoRAMemoryPool._has_moe_module",
        ours="sglang_ext.cpu.repairs:has_moe_module",
        why="memory is set aside for adapters of routed experts, which nothing computes on a CPU",
        until="SGLang's torch_native LoRA computes them",
    ),
    Replacement(
        QUANTIZATION_ON_CPUS,
        target="sglang.srt.layers.quantization:QUANTIZATION_METHODS[gptq]",
        ours="sglang_ext.quantization:DequantizedConfig",
        why="SGLang knows gptq only where it has kernels for it",
        until="SGLang asks an out-of-tree platform first",
        kind="set",
    ),
)


def apply(uses: Uses) -> None:
    """Install the replacements that these ``uses`` need; idempotent. Raise ``RuntimeError`` if one fails."""
    install(REPLACEMENTS, uses, "SGLang", __version__, _hook)


def _hook(replacement: Replacement, ours: Any) -> None:
    """Install through SGLang's registry of hooks, which also reaches modules that have already imported the target."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = replacement.target.replace(":", ".")
    HookRegistry.register(target, ours, HookType[replacement.kind.upper()])
    HookRegistry.apply_hooks()
    if target not in HookRegistry._patched:  # it only logs errors
        raise RuntimeError(f"SGLang {__version__} could not hook {target}; its log says why")
