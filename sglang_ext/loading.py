"""Loads a model on SGLang, also again while it serves: SGLang copies tensors over the old ones as they come."""

import glob
from typing import Any

from sglang.srt.runtime_context import get_model
from torch import nn

from qnext_plugin.checkpoint.guard import LoadGuard, Role
from qnext_plugin.checkpoint.merged import layer_name
from qnext_plugin.checkpoint.quantized_layers import check_update
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig


class Loading(LoadGuard):
    def __init__(
        self, model: nn.Module, config: QNextConfig, checkpoint: Checkpoint, role: Role, *, drafts_required: bool
    ) -> None:
        is_first = get_model().load_format != "dummy"
        super().__init__(config, role, drafts_required=drafts_required, is_first=is_first)
        self._model = model
        self._runner: Any = None
        # The trunk is loaded before the draft, and its check includes the draft.
        if role == "trunk" and is_first:
            self.check_first = checkpoint.headers is None
            if not self.check_first:
                checkpoint.check(config, self.mtp)

    def takes(self, name: str) -> bool:
        return (name.split(".")[0] == "mtp") == (self.role == "draft")

    def module(self, name: str) -> str:
        return layer_name(name.rpartition(".")[0])

    def entrances(self) -> list[tuple[Any, str]]:
        """Return the model and its runner, which decides whether to replay a graph.

        The runner is called for the trunk in every step, and for the draft at least with prompts.
        """
        return [(owner, "forward") for owner in (self._model, self._runner) if owner is not None]

    def begin(self, runner: Any, checkpoint: Checkpoint | None = None) -> None:
        """Begin an update of ``runner``'s model from a checkpoint, or from tensors that are still to come.

        Raise ``ValueError`` if the checkpoint does not fit.
        """
        if checkpoint is not None and checkpoint.headers is not None:
            checkpoint.check(self.config, self.mtp)
            check_update(self._model.checkpoint, checkpoint, dict(self._model.named_modules()))
        self._runner, self._changed = runner, False


def pattern_of(checkpoint: Checkpoint, prefix: str) -> list[str] | None:
    """Return a glob pattern of the files that have tensors with this ``prefix``, as a list for SGLang's loader.

    It takes the first pattern that matches a file, so there is only one; it may match a few more files. None means all
    files: their names differ in length, or are not known.
    """
    names = {info.file.name for name, info in (checkpoint.headers or {}).items() if name.startswith(prefix)}
    if len({len(name) for name in names}) != 1:
        return None
    columns = [sorted(set(column)) for column in zip(*names, strict=True)]
    return ["".join(glob.escape(c[0]) if len(c) == 1 else f"[{''.join(c)}]" for c in columns)]
