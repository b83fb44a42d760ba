"""Pipeline parallelism on CPUs: adds what vLLM's first model runner, the only one without Triton, lacks there."""

from collections.abc import Callable
from functools import cache
from typing import Any

from vllm.distributed import get_pp_group

# For each request: the drafts that were scheduled in its last step, and how many tokens that step accepted.
drafted: dict[str, list[int]] = {}
accepted: dict[str, int] = {}


def gather_intermediate_tensors(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``GPUModelRunner.sync_and_gather_intermediate_tensors``: give it a buffer for what a stage receives."""
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
    return original(runner, *args, **kwargs)


@cache
def absent_draft() -> type:
    """Return the class of the object that stands for the draft on stages that have none."""
    from vllm.v1.spec_decode.eagle import EagleProposer

    class AbsentDraft(EagleProposer):
        kv_cache_gid = -1
        model = None

        def __init__(self) -> None:
            pass

        def initialize_cudagraph_keys(self, *args: Any) -> None:
            pass

        def initialize_attn_backend(self, *args: Any) -> None:
            pass

    return AbsentDraft


def initialize_attn_backend(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``GPUModelRunner.initialize_attn_backend``: it expects a draft on every stage, so add a stand-in."""
    if not get_pp_group().is_last_rank:
        runner.drafter = absent_draft()()
    return original(runner, *args, **kwargs)


def update_states(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    """Wrap ``GPUModelRunner._update_states`` so that every stage knows how many drafts were accepted."""
    batch, cached = runner.input_batch, scheduler_output.scheduled_cached_reqs
    if get_pp_group().is_last_rank:
        # A step that does not schedule a request removes it from the batch, and this count with it.
        accepted.update((request, int(batch.num_accepted_tokens_cpu[i])) for request, i in rows(batch))
    else:
        for request, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            state, drafts = runner.requests[request], drafted.pop(request, [])
            kept = min(max(computed - state.num_computed_tokens - 1, 0), len(drafts))
            accepted[request] = kept + 1
            state.output_token_ids.extend(drafts[:kept])
        drafted.update(scheduler_output.scheduled_spec_decode_tokens)
    for request in scheduler_output.finished_req_ids:
        drafted.pop(request, None)
        accepted.pop(request, None)
    result = original(runner, scheduler_output)
    for request, i in rows(batch):
        batch.num_accepted_tokens_cpu[i] = accepted.get(request, 1)
    return result


def rows(batch: Any) -> list[tuple[str, int]]:
    return list(batch.req_id_to_index.items())
