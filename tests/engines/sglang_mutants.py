"""Breakages of what SGLang does with recurrent states; see ``mutants``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from tests.engines import mutants
from tests.engines.mutants import Mutant


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


# Those of our own layers are the same on both engines.
COMMON = (
    "conv_window_off_by_one_in_decode",
    "conv_window_off_by_one_in_prefill",
    "value_heads_swapped",
    "b_and_a_swapped",
    "query_and_gate_swapped",
    "decay_sign",
)
MUTANTS = {
    **{name: mutants.MUTANTS[name] for name in COMMON},
    "state_dropped_at_prefix_restore": Mutant(state_dropped_at_prefix_restore, "prefix_aba"),
    "conv_window_not_restored": Mutant(conv_window_not_restored, "prefix_aba"),
    "slot_not_zeroed": Mutant(slot_not_zeroed, "slot_reuse"),
}
