"""Breakages of what SGLang does with recurrent states; see ``tests.mutants``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from tests.mutants import Mutant, layers


def _after_copy(broken: Callable[[Any, Any], None]) -> AbstractContextManager[Any]:
    """Run ``broken(cache, slots)`` on the slots that a snapshot was just restored to."""
    from sglang.srt.mem_cache.memory_pool import MambaPool

    copy_from = MambaPool.copy_from

    def wrapper(self: Any, source: Any, target: Any) -> None:
        copy_from(self, source, target)
        broken(self.mamba_cache, target)

    return patch.object(MambaPool, "copy_from", wrapper)


def state_dropped_at_prefix_restore(worker: Any) -> AbstractContextManager[Any]:
    return _after_copy(lambda cache, slots: _zero(cache.temporal, slots))


def conv_window_not_restored(worker: Any) -> AbstractContextManager[Any]:
    return _after_copy(lambda cache, slots: _zero(cache.conv[0], slots))


def _zero(states: Any, slots: Any) -> None:
    states[:, slots] = 0


def slot_not_zeroed(worker: Any) -> AbstractContextManager[Any]:
    """A new sequence reads what its recurrent slot held before."""
    from sglang.srt.mem_cache.memory_pool import MambaPool

    return patch.object(MambaPool, "clear_slots", lambda self, indices: None)


def _commit(**changes: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Change arguments of the commit of accepted drafts, given as functions of them."""
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend

    name = "update_mamba_state_after_mtp_verify"
    commit = getattr(HybridLinearAttnBackend, name)

    def broken(self: Any, **kwargs: Any) -> None:
        commit(self, **kwargs | {name: change(kwargs[name]) for name, change in changes.items()})

    return patch.object(HybridLinearAttnBackend, name, broken)


def verify_commits_one_step_early(worker: Any) -> AbstractContextManager[Any]:
    """The states go on from before the last accepted draft."""
    return _commit(last_correct_step_indices=lambda steps: (steps - 1).clamp_min(0))


def state_kept_one_step_late(worker: Any) -> AbstractContextManager[Any]:
    """What the prefix cache keeps is not from the boundary but from the draft after it."""
    return _commit(mamba_steps_to_track=lambda steps: steps + (steps >= 0))


def tree_verified_as_a_chain(worker: Any) -> AbstractContextManager[Any]:
    """The recurrent state of each draft goes on from the draft before, not from its parent."""
    from qnext_plugin import ops

    verify = ops.verify_gated_delta_rule
    return patch.object(ops, "verify_gated_delta_rule", lambda *args, parents=None, **kwargs: verify(*args, **kwargs))


def draft_reads_the_wrong_hidden_state(worker: Any) -> AbstractContextManager[Any]:
    """The draft's input hidden states are those of the position before."""
    from sglang_ext.mtp import MultiTokenPredictor

    forward = MultiTokenPredictor.forward

    def broken(self: Any, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = forward_batch.spec_info
        with patch.object(drafts, "hidden_states", drafts.hidden_states.roll(1, dims=0)):
            return forward(self, input_ids, positions, forward_batch, *args, **kwargs)

    return patch.object(MultiTokenPredictor, "forward", broken)


def top_k_ignored(worker: Any) -> AbstractContextManager[Any]:
    from sglang.srt.layers import sampler

    sample = sampler.top_k_top_p_min_p_sampling_from_probs_torch

    def broken(probs: Any, top_ks: Any, *args: Any, **kwargs: Any) -> Any:
        return sample(probs, top_ks.clone().fill_(probs.shape[-1]), *args, **kwargs | {"max_top_k": None})

    return patch.object(sampler, "top_k_top_p_min_p_sampling_from_probs_torch", broken)


def unused_slots_poisoned(worker: Any) -> AbstractContextManager[Any]:
    cache = worker.model_runner.req_to_token_pool.mamba_pool.mamba_cache
    return layers.poisoned([*cache.conv, cache.temporal])


def neighbors_states_swapped_in_decode(worker: Any) -> AbstractContextManager[Any]:
    """Each sequence of a batch goes on from the recurrent state of the next one."""
    from qnext_plugin.ops.cpu import delta_rule

    decode = delta_rule.decode
    return patch.object(
        delta_rule, "decode", lambda *args, slots, **kwargs: decode(*args, slots=slots.roll(1), **kwargs)
    )


MUTANTS = [
    *layers.MUTANTS,
    Mutant(neighbors_states_swapped_in_decode, "mixed_lengths"),
    Mutant(neighbors_states_swapped_in_decode, "arrivals"),
    Mutant(state_dropped_at_prefix_restore, "prefix_aba"),
    Mutant(state_dropped_at_prefix_restore, "multi_turn"),
    Mutant(state_dropped_at_prefix_restore, "prefix_chunked", "starved"),
    Mutant(conv_window_not_restored, "prefix_aba"),
    Mutant(slot_not_zeroed, "slot_reuse"),
    Mutant(slot_not_zeroed, "aborts", "starved"),
    Mutant(slot_not_zeroed, "preemption", "starved"),
    Mutant(top_k_ignored, "sampled"),
    Mutant(verify_commits_one_step_early, "drafts_in_every_pattern", "mtp3"),
    Mutant(verify_commits_one_step_early, "drafts_all_right", "mtp3"),
    Mutant(verify_commits_one_step_early, "drafts_to_the_last_position", "mtp3"),
    Mutant(layers.value_heads_swapped, "drafts_of_the_model", "mtp3"),
    Mutant(draft_reads_the_wrong_hidden_state, "draft_logits", "mtp3"),
    Mutant(tree_verified_as_a_chain, "drafts_in_every_pattern", "mtp3-tree"),
    Mutant(state_kept_one_step_late, "multi_turn", "mtp3-tree"),
    Mutant(verify_commits_one_step_early, "drafts_in_every_pattern", "ngram"),
    Mutant(tree_verified_as_a_chain, "drafts_in_every_pattern", "ngram"),
    Mutant(state_kept_one_step_late, "multi_turn", "ngram"),
    Mutant(verify_commits_one_step_early, "drafts_in_every_pattern", "standalone"),
    Mutant(verify_commits_one_step_early, "drafts_in_every_pattern", "eagle3"),
    Mutant(unused_slots_poisoned, "prefix_aba", harmless=True),
    Mutant(unused_slots_poisoned, "drafts_in_every_pattern", "mtp3", harmless=True),
]
