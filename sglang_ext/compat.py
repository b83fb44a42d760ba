"""Everything that depends on the version of SGLang, patches included."""

from collections.abc import Callable
from functools import cache
from typing import Any

import sglang
import torch
from sglang.srt.platforms import current_platform

from qnext_plugin.checkpoint import RefusedUpdate

ON_CPU: bool = current_platform.device_type == "cpu"
"""Whether this process computes on a CPU, and so with kernels of ours."""


def check_platform() -> None:
    """``ValueError`` where a CPU is to compute without the platform that brings the kernels for it."""
    if ON_CPU and type(current_platform).__module__ != "sglang_ext.cpu_platform":
        raise ValueError(
            f"the platform is {type(current_platform).__name__}, expected qnext-plugin's own to compute on this CPU; "
            "unset SGLANG_USE_CPU_ENGINE and SGLANG_PLATFORM, or set QNEXT_DISABLE=1 to serve SGLang's own model"
        )


def unpadded(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the checkpoint has it.

    On CPU SGLang 0.5.23 pads sizes for its AMX kernels in place (``adjust_config_with_unaligned_cpu_tp``), keeping the
    originals beside them. It can go when that leaves out-of-tree platforms alone.
    """
    prefix = "original_"
    originals = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    if "total_num_kv_heads" in originals:
        originals["num_key_value_heads"] = originals.pop("total_num_kv_heads")
    return values | {name: value for name, value in originals.items() if name in values}


def bind_topk(topk: Any, experts: Any) -> None:
    """Tell the router which kernels run the experts, whose input it prepares.

    SGLang 0.5.22 asks the server's arguments instead. The question can go with its support.
    """
    if hasattr(topk, "bind_runner_backend"):
        topk.bind_runner_backend(experts.runner_backend, routing_method_type=experts.routing_method_type)


def is_prefill_alone(forward_batch: Any) -> bool:
    """Whether the linear-attention kernels run on prompts only, also where a decode step is labelled as one.

    SGLang 0.5.22 does not say, so False there. ``logical_forward_mode`` is enough when its support goes.
    """
    mode = getattr(forward_batch, "logical_forward_mode", None)
    return mode is not None and bool(mode.is_extend_without_speculative())


@cache
def install_cpu_kernels() -> None:
    """Put torch kernels in the place of the Triton ones that a hybrid model runs; idempotent.

    No CPU can run what they replace, so no other model can depend on it. They can go when SGLang lets an out-of-tree
    platform provide these (0.5.23 does not).
    """
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from sglang_ext import cpu_gemm, kernels

    BaseFusedOp.register_oot_forward(
        UnquantizedFusedMoEMethod, cpu_gemm.moe_forward, current_platform.get_dispatch_key_name()
    )

    backend = "sglang.srt.layers.attention.linear.gdn_backend."
    states = "sglang.kernels.ops.mamba.mamba_state_scatter_triton."
    _hook(
        "REPLACE",
        {
            backend + "TritonGDNKernel": kernels.TorchGDNKernel,
            backend + "causal_conv1d_fn": kernels.causal_conv1d_fn,
            backend + "causal_conv1d_update": kernels.causal_conv1d_update,
            backend + "fused_gdn_gating": kernels.fused_gdn_gating,
            states + "track_mamba_states_all_layers": kernels.track_states_all_layers,
            states + "track_mamba_states_if_needed": kernels.track_states,
            states + "scatter_mamba_states_after_mtp_verify": kernels.commit_states_after_verify,
        },
    )
    unpin_memory()


@cache
def install_cpu_speculation() -> None:
    """The same for the kernels and attention of speculative decoding, none of which SGLang has for this platform."""
    from sglang.srt.speculative import eagle_utils, spec_utils

    from sglang_ext import cpu_speculation as cpu
    from sglang_ext.cpu_attention import CpuAttentionBackend, CpuDraftBackend

    def create_decode_backend(factory: Any) -> Any:
        steps = factory.speculative_num_steps
        return CpuDraftBackend(factory.draft_model_runner, factory.topk, steps) if steps > 1 else None

    ops = "sglang.kernels.ops.speculative."
    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory."
    _hook(
        "REPLACE",
        {
            ops + "cache_locs.assign_draft_cache_locs_contiguous_func": cpu.assign_draft_cache_locs_contiguous_func,
            ops + "cache_locs.fill_front_out_cache_loc_func": cpu.fill_front_out_cache_loc_func,
            ops + "eagle.fill_accept_out_cache_loc_func": cpu.fill_accept_out_cache_loc_func,
            ops + "eagle.fill_bonus_tokens_func": cpu.fill_bonus_tokens_func,
            ops + "gather_spec_extras.gather_spec_extras": cpu.gather_spec_extras,
            ops + "spec_tree.build_tree_kernel_efficient_func": cpu.build_tree_kernel_efficient_func,
            ops + "spec_tree.verify_tree_greedy_func": cpu.verify_tree_greedy_func,
            "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": cpu.assign_req_to_token_pool_func,
            factory + "create_decode_backend": create_decode_backend,
            factory + "create_draft_extend_backend": lambda factory: CpuAttentionBackend(factory.draft_model_runner),
        },
    )
    for function in (cpu.tree_speculative_sampling_target_only, cpu.top_k_renorm_prob, cpu.top_p_renorm_prob):
        name = function.__name__
        if getattr(eagle_utils, name, ...) is not None:
            raise RuntimeError(f"SGLang {sglang.__version__} has a {name} on CPU, expected none")
        setattr(eagle_utils, name, function)
    # It would compile this one, for seconds, while the first request waits.
    compiled = spec_utils._select_top_k_tokens_later
    spec_utils._select_top_k_tokens_later = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def _hook(kind: str, hooks: dict[str, Callable[..., Any]]) -> None:
    """``REPLACE`` each target, or go ``AROUND`` it: called with the original first, then with its arguments."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType[kind])
    HookRegistry.apply_hooks()
    # It logs a target that it does not find, and goes on.
    missing = hooks.keys() - HookRegistry._patched
    if missing:
        raise RuntimeError(f"SGLang {sglang.__version__} has no {', '.join(sorted(missing))}, expected to hook it")


def uses_expert_location(experts: Any) -> bool:
    """Whether a layer's experts are where the load balancer wants them, which those of a draft are not.

    SGLang 0.5.22 makes no difference. The question can go with its support.
    """
    return bool(getattr(experts, "uses_expert_location", True))


def accept_quantisations() -> None:
    """Let a CPU load checkpoints in any format, which are dequantised there; idempotent.

    SGLang 0.5.23 knows ``gptq`` only where it has kernels for it. It can go when it asks an out-of-tree platform first.
    """
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    from sglang_ext.quantization import DequantisedConfig

    if ON_CPU:
        QUANTIZATION_METHODS.setdefault("gptq", DequantisedConfig)


@cache
def guard_weight_updates() -> None:
    """Tell our models that an update begins, and answer one that they refuse; idempotent.

    SGLang 0.5.23 ends the scheduler process where tensors do not fit, and goes back to the old weights by reading the
    new files again. It can go when an update is refused before it changes anything.
    """
    Around = Callable[..., Any]

    def loading(updater: Any) -> Any:
        return getattr(updater.get_model(), "loading", None)

    def begin(original: Around, updater: Any, *args: Any, **kwargs: Any) -> Any:
        if loading(updater) is not None:
            loading(updater).begin()
        return original(updater, *args, **kwargs)

    def from_disk(original: Around, updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
        from sglang_ext.quantization import loading_from, read_stored

        try:
            if loading(updater) is not None:
                loading(updater).begin(model_path)
            stored = read_stored(model_path)
        except ValueError as e:
            return False, f"{e}; the old weights serve on"
        with loading_from(stored):
            return original(updater, model_path, *args, **kwargs)

    def from_tensor(original: Around, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RefusedUpdate as e:
            return False, str(e)

    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    _hook(
        "AROUND",
        {
            updater + "begin_weight_update": begin,
            updater + "update_weights_from_disk": from_disk,
            updater + "update_weights_from_tensor": from_tensor,
        },
    )


@cache
def prepare_adapters() -> None:
    """Let a model with ``prepare_adapter`` say what to make of each LoRA adapter's tensors; idempotent.

    SGLang 0.5.23 sorts them by the last parts of their names, takes a draft's for those of the first layers, and
    leaves out in silence what it has no place for. It can go when it lets a model see an adapter first.
    """

    def process(original: Callable[..., None], adapter: Any, name: str, tensor: torch.Tensor) -> None:
        if hasattr(adapter.base_model, "prepare_adapter"):
            adapter.__dict__.setdefault("tensors_read", {})[name] = tensor.cpu()
        else:
            original(adapter, name, tensor)

    def normalize(original: Callable[..., None], adapter: Any) -> None:
        if hasattr(adapter.base_model, "prepare_adapter"):
            adapter.base_model.prepare_adapter(adapter, adapter.__dict__.pop("tensors_read", {}))
        original(adapter)

    adapter = "sglang.srt.lora.lora.LoRAAdapter."
    _hook("AROUND", {adapter + "_process_weight": process, adapter + "_normalize_weights": normalize})


@cache
def install_cpu_lora() -> None:
    """Let SGLang's ``torch_native`` LoRA run where torch cannot pin memory, also for linears that are not split.

    And without memory for adapters of routed experts, which nothing here computes. SGLang 0.5.23 pins unconditionally,
    and ``ReplicatedLinearWithLoRA`` forgets an argument. It can go when neither does.
    """
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    class Unpinned:
        """``torch``, whose constructors do not pin."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def tensor(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return torch.tensor(*args, **kwargs)

        def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return torch.zeros(*args, **kwargs)

    def run_lora_b(original: Callable[..., torch.Tensor], backend: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.setdefault("output_offset_cpu", kwargs["output_offset"])
        return original(backend, **kwargs)

    for module in (layers, torch_backend):
        module.torch = Unpinned()
    _hook("AROUND", {"sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.run_lora_b_sgemm": run_lora_b})
    _hook("REPLACE", {"sglang.srt.lora.mem_pool.LoRAMemoryPool._has_moe_module": lambda model: False})


@cache
def guard_vocabulary(vocab_size: int) -> None:
    """Answer a request with ids outside the vocabulary, or for more log-probabilities than it has ids; idempotent.

    With SGLang 0.5.23 either ends the scheduler process. It can go when SGLang checks them.
    """

    def validate(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
        ids = req.origin_input_ids
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            message = f"token ids from {min(ids)} to {max(ids)} found, expected 0 to {vocab_size - 1}"
            req.set_finish_with_abort(message)  # what is returned here ends no request for an embedding
            return message
        if (asked := req.logprob.top_logprobs_num) > vocab_size:
            req.logprob.top_logprobs_num = 0  # what is refused is still computed with what runs beside it
            return f"{asked} log-probabilities asked for, of {vocab_size} token ids"
        return original(req, *args, **kwargs)

    _hook("AROUND", {"sglang.srt.managers.scheduler.validate_input_length": validate})


def unpin_memory() -> None:
    """Let ``Tensor.pin_memory`` return the tensor itself where torch cannot pin, and leave captured experts unpinned.

    SGLang 0.5.23 pins without asking the platform in ``ScheduleBatch.prepare_for_decode`` and for
    ``--enable-return-routed-experts``. It can go when they ask ``is_pin_memory_available``, as their neighbours do.
    """
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    try:
        torch.zeros(1).pin_memory()
    except RuntimeError:
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment]
        common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
