"""Repairs of what vLLM's CPU backend lacks on several ranks; as in ``compat.py``."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_ext.cpu.experts import local_experts
from vllm_ext.patching import replace

PIPELINE_DRAFT_SCHEDULER = "vllm_ext.scheduler.PipelineDraftScheduler"


def repair(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        _expert_parallel()
    if parallel.data_parallel_size > 1:
        _data_parallel()
    if parallel.pipeline_parallel_size > 1:
        _pipeline_parallel()
        if vllm_config.speculative_config is not None:
            if vllm_config.cache_config.enable_prefix_caching:
                raise ValueError(
                    "pipeline parallelism with MTP and prefix caching found; on CPU vLLM carries the states of cached "
                    "prefixes on the last stage only: add --no-enable-prefix-caching, or drop one of the other two"
                )
            if vllm_config.scheduler_config.scheduler_cls != PIPELINE_DRAFT_SCHEDULER:
                raise ValueError(
                    "pipeline parallelism with MTP found; on CPU vLLM's scheduler would put the drafts in the place of "
                    f"the token they follow: add --scheduler-cls {PIPELINE_DRAFT_SCHEDULER}"
                )
            _pipeline_parallel_with_mtp()


@cache
def _expert_parallel() -> None:
    """The CPU expert kernel reads past its weights: it takes global expert ids for local ones.

    Can go when ``CPUUnquantizedExperts.apply`` looks at ``expert_map``.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    def apply(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs).arguments
        local = local_experts(call["expert_map"], call["topk_weights"], call["topk_ids"])
        call["topk_weights"], call["topk_ids"] = local
        original(**call)

    signature = replace(CPUUnquantizedExperts, "apply", apply, ("topk_weights", "topk_ids", "expert_map"))


@cache
def _data_parallel() -> None:
    """Ranks with different numbers of tokens cannot exchange them for the experts.

    Can go when ``CpuCommunicator`` has both methods; then it does nothing.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def gather(original: Any, self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        assert dim == 0
        if isinstance(input_, list):
            return [self.all_gatherv(x, dim, sizes) for x in input_]
        # gloo gathers equal sizes only, so each rank adds its rows to zeros.
        sizes = sizes or [len(input_)] * self.world_size
        out = input_.new_zeros(sum(sizes), *input_.shape[1:])
        out.split(sizes)[self.rank_in_group].copy_(input_)
        torch.distributed.all_reduce(out, group=self.device_group)
        return out

    def scatter(
        original: Any, self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        assert dim == 0
        summed = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=self.device_group)
        return summed.split(sizes or len(summed) // self.world_size)[self.rank_in_group]

    if "all_gatherv" not in vars(CpuCommunicator):
        replace(CpuCommunicator, "all_gatherv", gather, ("input_", "dim", "sizes"))
        replace(CpuCommunicator, "reduce_scatterv", scatter, ("input_", "dim", "sizes"))


@cache
def _pipeline_parallel() -> None:
    """Later stages have no buffer for what they receive, unless a compiled model was warmed up.

    Can go when ``CPUModelRunner.warming_up_model`` also runs eagerly.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    replace(GPUModelRunner, "sync_and_gather_intermediate_tensors", sync, ("num_tokens", "intermediate_tensors"))


@cache
def _pipeline_parallel_with_mtp() -> None:
    """Stages before the last look for a draft that only the last has, and do not know how many were accepted.

    Can go when CPUs get vLLM's second model runner, which does both.
    """
    from vllm.distributed import get_pp_group
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class AbsentDraft(EagleProposer):
        kv_cache_gid = -1
        model = None

        def __init__(self) -> None:
            pass

        def initialize_cudagraph_keys(self, *args: Any) -> None:
            pass

        def initialize_attn_backend(self, *args: Any) -> None:
            pass

    def initialize(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if not get_pp_group().is_last_rank:
            self.drafter = AbsentDraft()
        return original(self, *args, **kwargs)

    drafted: dict[str, list[int]] = {}
    accepted: dict[str, int] = {}

    def update(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
        batch, cached = self.input_batch, scheduler_output.scheduled_cached_reqs
        if get_pp_group().is_last_rank:
            # A step without a request's turn takes it out of the batch, and this count with it.
            accepted.update((request, int(batch.num_accepted_tokens_cpu[i])) for request, i in rows(batch))
        else:
            for request, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                state, drafts = self.requests[request], drafted.pop(request, [])
                kept = min(max(computed - state.num_computed_tokens - 1, 0), len(drafts))
                accepted[request] = kept + 1
                state.output_token_ids.extend(drafts[:kept])
            drafted.update(scheduler_output.scheduled_spec_decode_tokens)
        for request in scheduler_output.finished_req_ids:
            drafted.pop(request, None)
            accepted.pop(request, None)
        result = original(self, scheduler_output)
        for request, i in rows(batch):
            batch.num_accepted_tokens_cpu[i] = accepted.get(request, 1)
        return result

    def rows(batch: Any) -> list[tuple[str, int]]:
        return list(batch.req_id_to_index.items())

    replace(GPUModelRunner, "initialize_attn_backend", initialize, ("kv_cache_config",))
    replace(GPUModelRunner, "_update_states", update, ("scheduler_output",))
