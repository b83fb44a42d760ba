"""Breakages of what vLLM does with recurrent states and drafts; see ``tests.mutants``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from tests.mutants import Mutant, layers


def slot_not_zeroed(worker: Any) -> AbstractContextManager[Any]:
    """A new sequence reads what its recurrent slot held before."""
    from vllm_ext.cpu.phases import TorchDelta

    prefill = TorchDelta.prefill

    def broken(self: Any, layer: Any, mixed: Any, b: Any, a: Any, batch: Any) -> Any:
        return prefill(self, layer, mixed, b, a, replace(batch, has_state=torch.ones_like(batch.has_state)))

    return patch.object(TorchDelta, "prefill", broken)


def state_dropped_at_prefix_restore(worker: Any) -> AbstractContextManager[Any]:
    """A prefix-cache hit finds zeros where the restored recurrent state should be."""
    from vllm.v1.worker import mamba_utils

    preprocess = mamba_utils.preprocess_mamba

    def broken(
        scheduler_output: Any, kv_cache_config: Any, cache_config: Any, state_idx: Any, input_batch: Any,
        requests: Any, forward_context: Any, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        known = set(state_idx)
        preprocess(
            scheduler_output, kv_cache_config, cache_config, state_idx, input_batch, requests, forward_context,
            *args, **kwargs,
        )  # fmt: skip
        restored = [r for r in input_batch.req_ids if r not in known and requests[r].num_computed_tokens > 0]
        for group, spec in enumerate(kv_cache_config.kv_cache_groups):
            for name in spec.layer_names:
                if type(forward_context[name]).__name__ == "GatedDeltaNet":
                    for request in restored:
                        block = requests[request].block_ids[group][state_idx[request]]
                        forward_context[name].kv_cache[1][block] = 0

    return patch.object(mamba_utils, "preprocess_mamba", broken)


def _drafts(**changes: Callable[[Any], torch.Tensor]) -> AbstractContextManager[Any]:
    """Replace fields of each speculative batch, given as functions of it."""
    from vllm_ext.cpu.phases import Drafts

    of = Drafts.of

    def broken(metadata: Any) -> Any:
        drafts = of(metadata)
        return replace(drafts, **{name: change(drafts) for name, change in changes.items()})

    return patch.object(Drafts, "of", broken)


def verify_commits_one_step_early(worker: Any) -> AbstractContextManager[Any]:
    """The recurrent state goes on from before the last accepted draft; the convolution is right."""
    from vllm_ext.cpu.phases import TorchDelta

    verify = TorchDelta.verify

    def broken(self: Any, layer: Any, mixed: Any, b: Any, a: Any, drafts: Any) -> Any:
        return verify(self, layer, mixed, b, a, replace(drafts, num_accepted=(drafts.num_accepted - 1).clamp_min(1)))

    return patch.object(TorchDelta, "verify", broken)


def state_in_the_wrong_slot(worker: Any) -> AbstractContextManager[Any]:
    """The states after the drafts land one block-table column off."""
    return _drafts(slots=lambda drafts: drafts.slots.roll(1, dims=1))


def accepted_tokens_forgotten_without_drafts(worker: Any) -> AbstractContextManager[Any]:
    """A step for which nothing was drafted goes on from the first token of the last step."""
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder

    build = GDNAttentionMetadataBuilder.build

    def broken(
        self: Any, *args: Any, num_accepted_tokens: Any = None, num_decode_draft_tokens_cpu: Any = None, **kwargs: Any
    ) -> Any:
        if num_decode_draft_tokens_cpu is not None:
            num_accepted_tokens = num_accepted_tokens.masked_fill(num_decode_draft_tokens_cpu == 0, 1)
        return build(
            self,
            *args,
            num_accepted_tokens=num_accepted_tokens,
            num_decode_draft_tokens_cpu=num_decode_draft_tokens_cpu,
            **kwargs,
        )

    return patch.object(GDNAttentionMetadataBuilder, "build", broken)


def conv_window_not_rolled_back(worker: Any) -> AbstractContextManager[Any]:
    """The convolution goes on as if every draft had been accepted; the recurrent state is right."""
    from vllm_ext.cpu.phases import TorchConv

    verify = TorchConv.verify

    def broken(self: Any, layer: Any, x: Any, drafts: Any) -> Any:
        every = torch.full_like(drafts.num_accepted, drafts.slots.shape[1])
        return verify(self, layer, x, replace(drafts, num_accepted=every))

    return patch.object(TorchConv, "verify", broken)


def draft_reads_the_wrong_hidden_state(worker: Any) -> AbstractContextManager[Any]:
    """The draft's input hidden states are those of the position before."""
    predictor = worker.model_runner.drafter.model.model
    forward = predictor.forward

    def broken(input_ids: Any, positions: Any, hidden_states: Any, *args: Any) -> Any:
        return forward(input_ids, positions, hidden_states.roll(1, dims=0), *args)

    return patch.object(predictor, "forward", broken)


def _state_copy(broken: Callable[..., None]) -> AbstractContextManager[Any]:
    """Replace the copy of a request's states between cache blocks by ``broken(original, *args)``."""
    from vllm_ext.cpu.triton import States

    copy = States.copy
    return patch.object(States, "copy", lambda *args: broken(copy, *args))


def state_copy_ignores_accepted_drafts(worker: Any) -> AbstractContextManager[Any]:
    def broken(copy: Any, states: Any, request: int, src: int, dst: int, bias: int, dim_first: bool) -> None:
        copy(states, request, src, dst, 0, dim_first)

    return _state_copy(broken)


def state_not_copied_between_blocks(worker: Any) -> AbstractContextManager[Any]:
    return _state_copy(lambda *args: None)


def first_view_of_a_page_copied(worker: Any) -> AbstractContextManager[Any]:
    """vLLM's own copy of blocks, which takes a state for all that its page holds."""
    from vllm.v1.worker import gpu_model_runner, utils

    return patch.object(gpu_model_runner, "copy_kv_cache_blocks_inplace", utils.copy_kv_cache_blocks_inplace)


def placeholders_run_as_a_prompt(worker: Any) -> AbstractContextManager[Any]:
    """As in vLLM's second model runner: a prompt of one token that joins others is computed with its placeholders."""
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState as State

    return patch.object(State, "prepare_attn", State.prepare_attn.__wrapped__)


def placeholders_go_on_from_an_old_state(worker: Any) -> AbstractContextManager[Any]:
    """As in vLLM: with placeholders, that prompt goes on from what the last user of its slot has left."""
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder as Builder

    return patch.object(Builder, "build", Builder.build.__wrapped__)


def old_state_in_other_groups(worker: Any) -> AbstractContextManager[Any]:
    """The same for the groups of layers that get their metadata from those of the first."""
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder as Builder

    return patch.object(Builder, "update_block_table", Builder.update_block_table.__wrapped__)


def state_left_in_the_block_before(worker: Any) -> AbstractContextManager[Any]:
    """vLLM's second model runner copies no state to a request's next block."""
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

    return patch.object(MambaSpecDecodeGPUContext, "run_fused_precopy", lambda *args: None)


def seeds_ignored(worker: Any) -> AbstractContextManager[Any]:
    sampler = worker.model_runner.sampler.topk_topp_sampler
    forward = sampler.forward
    return patch.object(sampler, "forward", lambda logits, generators, k, p: forward(logits, {}, k, p))


def unused_slots_poisoned(worker: Any) -> AbstractContextManager[Any]:
    return layers.poisoned([state for mixer in layers.mixers(worker) for state in mixer.kv_cache])


def neighbors_states_swapped_in_decode(worker: Any) -> AbstractContextManager[Any]:
    """Each sequence of a batch reads the recurrent state of the next one."""

    def broken(original: Callable[..., Any], *args: Any, initial_state: torch.Tensor, **kwargs: Any) -> Any:
        return original(*args, initial_state=initial_state.roll(1, dims=0), **kwargs)

    return layers.ops_replaced("recurrent_gated_delta_rule", broken)


MUTANTS = [
    *layers.MUTANTS,
    Mutant(neighbors_states_swapped_in_decode, "mixed_lengths"),
    Mutant(neighbors_states_swapped_in_decode, "arrivals"),
    Mutant(state_dropped_at_prefix_restore, "prefix_aba"),
    Mutant(state_dropped_at_prefix_restore, "prefix_chunked", "starved"),
    Mutant(slot_not_zeroed, "slot_reuse"),
    Mutant(slot_not_zeroed, "aborts", "starved"),
    Mutant(slot_not_zeroed, "preemption", "starved"),
    Mutant(first_view_of_a_page_copied, "partial_hits", "mtp2-prefix-unit"),
    Mutant(seeds_ignored, "sampled"),
    Mutant(verify_commits_one_step_early, "drafts_in_every_pattern", "mtp3"),
    Mutant(verify_commits_one_step_early, "drafts_all_right", "mtp3"),
    Mutant(state_in_the_wrong_slot, "drafts_in_every_pattern", "mtp3"),
    Mutant(state_in_the_wrong_slot, "drafts_to_the_last_position", "mtp3"),
    Mutant(conv_window_not_rolled_back, "drafts_in_every_pattern", "mtp3"),
    Mutant(conv_window_not_rolled_back, "drafts_of_the_model", "mtp3"),
    Mutant(state_copy_ignores_accepted_drafts, "multi_turn", "mtp2"),
    Mutant(state_not_copied_between_blocks, "multi_turn", "mtp2"),
    Mutant(draft_reads_the_wrong_hidden_state, "draft_logits", "mtp3"),
    Mutant(accepted_tokens_forgotten_without_drafts, "drafts_in_every_pattern", "ngram3"),
    Mutant(verify_commits_one_step_early, "multi_turn", "mtp3-by-batch"),
    Mutant(verify_commits_one_step_early, "drafts_of_the_model", "ngram3"),
    Mutant(conv_window_not_rolled_back, "arrivals", "ngram3"),
    Mutant(state_copy_ignores_accepted_drafts, "multi_turn", "ngram3"),
    Mutant(placeholders_go_on_from_an_old_state, "arrivals", "mtp2"),
    Mutant(placeholders_run_as_a_prompt, "one_token_joins", "second-runner-mtp2"),
    Mutant(old_state_in_other_groups, "one_token_joins", "second-runner-mtp2"),
    Mutant(state_left_in_the_block_before, "prefix_chunked", "second-runner-mtp2"),
    Mutant(unused_slots_poisoned, "prefix_aba", harmless=True),
    Mutant(unused_slots_poisoned, "drafts_in_every_pattern", "mtp3", harmless=True),
]
