"""What is put in the place of SGLang's functions where it computes on a CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import sglang
import torch
from sglang.srt.platforms import current_platform

from sglang_ext.patching import hook


@cache
def install_cpu_kernels() -> None:
    """Put torch kernels in the place of the Triton ones that a hybrid model runs; idempotent.

    No CPU can run what they replace, so no other model can depend on it. They can go when SGLang lets an out-of-tree
    platform provide these (0.5.23 does not).
    """
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from sglang_ext.cpu import gated_delta_net, gemm

    BaseFusedOp.register_oot_forward(
        UnquantizedFusedMoEMethod, gemm.moe_forward, current_platform.get_dispatch_key_name()
    )

    backend = "sglang.srt.layers.attention.linear.gdn_backend."
    states = "sglang.kernels.ops.mamba.mamba_state_scatter_triton."
    hook(
        "REPLACE",
        {
            backend + "TritonGDNKernel": gated_delta_net.TorchGDNKernel,
            backend + "causal_conv1d_fn": gated_delta_net.causal_conv1d_fn,
            backend + "causal_conv1d_update": gated_delta_net.causal_conv1d_update,
            backend + "fused_gdn_gating": gated_delta_net.fused_gdn_gating,
            states + "track_mamba_states_all_layers": gated_delta_net.track_states_all_layers,
            states + "track_mamba_states_if_needed": gated_delta_net.track_states,
            states + "scatter_mamba_states_after_mtp_verify": gated_delta_net.commit_states_after_verify,
        },
    )
    unpin_memory()


@cache
def install_cpu_speculation() -> None:
    """The same for the kernels and attention of speculative decoding, none of which SGLang has for this platform."""
    from sglang.srt.speculative import eagle_utils, spec_utils

    from sglang_ext.cpu import speculation as cpu
    from sglang_ext.cpu.attention import CpuAttentionBackend, CpuDraftBackend

    def create_decode_backend(factory: Any) -> Any:
        steps = factory.speculative_num_steps
        return CpuDraftBackend(factory.draft_model_runner, factory.topk, steps) if steps > 1 else None

    ops = "sglang.kernels.ops.speculative."
    factory = "sglang.srt.speculative.draft_utils.DraftBackendFactory."
    hook(
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
    hook("AROUND", {"sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.run_lora_b_sgemm": run_lora_b})
    hook("REPLACE", {"sglang.srt.lora.mem_pool.LoRAMemoryPool._has_moe_module": lambda model: False})


def accept_quantizations() -> None:
    """Let a CPU load checkpoints in any format, which are dequantized there; idempotent.

    SGLang 0.5.23 knows ``gptq`` only where it has kernels for it. It can go when it asks an out-of-tree platform first.
    """
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    from sglang_ext.quantization import DequantizedConfig

    QUANTIZATION_METHODS.setdefault("gptq", DequantizedConfig)


def unpin_memory() -> None:
    """Let ``Tensor.pin_memory`` return the tensor itself where torch cannot pin, and leave captured experts unpinned.

    SGLang 0.5.23 pins without asking the platform in ``ScheduleBatch.prepare_for_decode`` and for
    ``--enable-return-routed-experts``. It can go when they ask ``is_pin_memory_available``, as their neighbors do.
    """
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    try:
        torch.zeros(1).pin_memory()
    except RuntimeError:
        torch.Tensor.pin_memory = lambda self, device=None: self
        common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
