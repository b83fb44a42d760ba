"""How SGLang loads a model that serves again: it copies tensors over the old ones as they come."""

from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_model
from torch import nn

from qnext_plugin.checkpoint.guard import LoadGuard, Role
from qnext_plugin.checkpoint.quantized_layers import layer_name
from qnext_plugin.config import QNextConfig
from sglang_ext.weights import check_checkpoint, check_directory


class Loading(LoadGuard):
    def __init__(self, model: nn.Module, config: QNextConfig, role: Role, *, drafts_required: bool) -> None:
        is_first = get_model().load_format != "dummy"
        super().__init__(config, role, drafts_required=drafts_required, is_first=is_first)
        self._model = model
        self._runner: Any = None
        # The trunk is loaded before the draft, and its check includes the draft.
        self.check_first = role == "trunk" and is_first and not check_checkpoint(config, self.mtp)

    def takes(self, name: str) -> bool:
        return (name.split(".")[0] == "mtp") == (self.role == "draft")

    def module(self, name: str) -> str:
        return layer_name(name.rpartition(".")[0])

    def entrances(self) -> list[tuple[Any, str]]:
        """The runner decides whether to replay a graph: it is called for the trunk in every step, for the draft at
        least with prompts.
        """
        return [(owner, "forward") for owner in (self._model, self._runner) if owner is not None]

    def begin(self, runner: Any, directory: str | None = None) -> None:
        """An update of ``runner``'s model begins: of tensors to come, or of a local checkpoint.

        ``ValueError`` where the checkpoint does not fit.
        """
        if directory is not None and any(Path(directory).glob("*.safetensors")):
            check_directory(self.config, Path(directory), self.mtp)
        self._runner, self._changed = runner, False
