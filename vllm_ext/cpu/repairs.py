"""Replacements for vLLM methods that have gaps on CPUs; ``compat.REPLACEMENTS`` tells why and until when."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vllm_ext.cpu.expert_ids import local_experts

signature = cache(inspect.signature)

NO_ATTRIBUTES: dict[str, object] = {}
"""The answer of llvmlite's library when vLLM asks for its ``__dict__``."""


def sample_tokens(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``GPUModelRunner.sample_tokens``: hide the generators of requests whose prompt is not yet complete.

    After sampling, vLLM resets such a generator, which CPU generators do not allow; so the sampler must not use it.
    """
    generators = runner.input_batch.generators
    unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    held = {i: generators.pop(i) for i in unfinished if i in generators}
    try:
        return original(runner, *args, **kwargs)
    finally:
        generators.update(held)


def setup_expert_kernel(original: Callable[..., None], method: Any, layer: nn.Module, w13: Any, w2: Any) -> None:
    """Wrap ``UnquantizedFusedMoEMethod._setup_kernel`` so that it also packs weights that are loaded again."""
    again = method.moe_kernel is not None
    original(method, layer, w13, w2)
    if again:
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def declines_layer(*_: Any, **__: Any) -> bool:
    """Replace ``FusedMoEWithLoRA.can_replace_layer``: decline, as the routed experts' kernel has no LoRA."""
    return False


def shrink(original: Callable[..., None], wrapper: Any, y: Tensor, *args: Any) -> None:
    """Wrap ``PunicaWrapperCPU._apply_shrink``: write zeros for requests without an adapter, whose index is -1."""
    original(wrapper, y, *args)
    y.masked_fill_((wrapper.token_lora_indices < 0)[:, None], 0)


def apply_top_k_only(original: Callable[..., Tensor], logits: Tensor, k: Tensor) -> Tensor:
    """Wrap ``apply_top_k_only``: leave logits of no rows as they are."""
    return original(logits, k) if len(logits) else logits


def apply_experts(original: Callable[..., None], experts: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap ``CPUUnquantizedExperts.apply``: pass it this rank's expert ids."""
    call = signature(original).bind(experts, *args, **kwargs).arguments
    local = local_experts(call["expert_map"], call["topk_weights"], call["topk_ids"])
    call["topk_weights"], call["topk_ids"] = local
    original(**call)


def all_gatherv(
    communicator: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    """Add ``CpuCommunicator.all_gatherv``: return the rows of all ranks, whose numbers of rows may differ."""
    assert dim == 0
    if isinstance(input_, list):
        return [communicator.all_gatherv(x, dim, sizes) for x in input_]
    # gloo gathers only equal sizes, so each rank adds its rows to zeros.
    sizes = sizes or [len(input_)] * communicator.world_size
    out = input_.new_zeros(sum(sizes), *input_.shape[1:])
    out.split(sizes)[communicator.rank_in_group].copy_(input_)
    torch.distributed.all_reduce(out, group=communicator.device_group)
    return out


def reduce_scatterv(communicator: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """Add ``CpuCommunicator.reduce_scatterv``: sum over ranks, and return the rows of this rank."""
    assert dim == 0
    summed = input_.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(summed, group=communicator.device_group)
    return summed.split(sizes or len(summed) // communicator.world_size)[communicator.rank_in_group]
