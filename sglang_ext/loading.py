"""The first load of a model and every later one, into a model that serves.

SGLang copies tensors over the old ones as they come. Here they are checked before that: what does not fit changes
nothing, and a model left with a mix of old and new weights stops serving.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Literal, Protocol

import torch
from sglang.srt.runtime_context import get_model

from qnext_plugin.checkpoint.headers import TensorInfo, describe
from qnext_plugin.checkpoint.schema import UpdateCheck, check_coverage, check_stream
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig

Weights = Iterable[tuple[str, torch.Tensor]]


class Copy(Protocol):
    """Copies tensors into the model; ``complete``: they are all of them."""

    def __call__(self, weights: Weights, *, complete: bool) -> set[str]: ...


class Loading:
    def __init__(self, config: QNextConfig, checkpoint: Checkpoint, mtp: Literal["required", "optional"]) -> None:
        self._config, self._mtp = config, mtp
        # Nothing is known of what follows dummy weights: updates may bring a few tensors at a time.
        self._first = get_model().load_format != "dummy"
        self._whole_stream = self._first and checkpoint.headers is None
        if self._first and not self._whole_stream:
            checkpoint.check(config, mtp)
        self._changed = False  # by the update that is going on
        self._seen: dict[str, TensorInfo] | None = None  # since one failed half-way
        self._reason = ""

    @cached_property
    def _check(self) -> UpdateCheck:
        return UpdateCheck(self._config)

    def begin(self, checkpoint: Checkpoint | None = None) -> None:
        """An update begins: of tensors to come, or of a checkpoint; ``ValueError`` where that does not fit."""
        if checkpoint is not None and checkpoint.headers is not None:
            checkpoint.check(self._config, self._mtp)
        self._changed = False

    def check_complete(self) -> None:
        """``RuntimeError`` where an update has left a mix of old and new weights."""
        if self._seen is not None:
            raise RuntimeError(
                f"the last weight update is incomplete: {self._reason}. Load a whole checkpoint, or start again"
            )

    def load(self, weights: Weights, copy: Copy) -> set[str]:
        """Check ``weights``, ``copy`` them into the model; returns the parameters loaded.

        A ``RefusedUpdate`` before anything is copied leaves the model as it was.
        """
        if self._first:
            loaded = copy(
                check_stream(weights, self._config, self._mtp) if self._whole_stream else weights, complete=True
            )
            self._first = False
            return loaded
        try:
            if isinstance(weights, list | tuple):
                self._check(weights)
            loaded = copy(self._watch(weights), complete=False)
        except Exception as e:
            if self._changed:
                self._seen, self._reason = {}, str(e)
            raise
        if self._seen is not None and not missing(self._config, self._seen):
            self._seen = None
        return loaded

    def _watch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._check([(name, tensor)])
            self._changed = True
            if self._seen is not None:
                self._seen[name] = describe(tensor)
            yield name, tensor


def missing(config: QNextConfig, headers: dict[str, TensorInfo]) -> bool:
    try:
        check_coverage(config, headers)
    except ValueError:
        return True
    return False
