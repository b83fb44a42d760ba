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


MUTANTS = {
    **layers.MUTANTS,
    "state_dropped_at_prefix_restore": Mutant(state_dropped_at_prefix_restore, "prefix_aba"),
    "conv_window_not_restored": Mutant(conv_window_not_restored, "prefix_aba"),
    "slot_not_zeroed": Mutant(slot_not_zeroed, "slot_reuse"),
}
