"""Loads a model on vLLM, the first time and again while it serves.

vLLM packs weights as it loads them. To load again it opens a session: this collects a module's tensors until all have
arrived, then packs them and copies them over the old ones.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config

from qnext_plugin.checkpoint.guard import Copy, LoadGuard, Role, Weights, listed
from qnext_plugin.checkpoint.quantized_layers import check_update
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig
from vllm_ext.compat import ReloadSession
from vllm_ext.config import uses_mtp
from vllm_ext.quantization import quantizable, read_checkpoint
from vllm_ext.weights import check_checkpoint, is_draft, is_trunk, unit


class Loading(LoadGuard):
    def __init__(
        self, model: nn.Module, config: QNextConfig, vllm_config: VllmConfig, checkpoint: Checkpoint, role: Role
    ) -> None:
        # vLLM loads the trunk again without the draft, so only what is loaded for the draft must contain it.
        is_first = vllm_config.load_config.load_format != "dummy"
        super().__init__(config, role, drafts_required=role == "draft", is_first=is_first)
        self._model, self._vllm_config = model, vllm_config
        self.checkpoint = checkpoint  # the one that serves or is being loaded
        # The loader may pass on only this rank's experts.
        self._some_experts = vllm_config.parallel_config.enable_ep_weight_filter
        drafts = "required" if uses_mtp(vllm_config) else "optional"
        self.check_first = not (check_checkpoint(checkpoint, config, vllm_config, drafts) or self._some_experts)
        self._served_path = vllm_config.model_config.model
        self._before: list[str] = []  # modules that were incomplete before the open session

    def takes(self, name: str) -> bool:
        return is_draft(name) if self.role == "draft" else is_trunk(name)

    def module(self, name: str) -> str:
        return unit(name)

    def awaits(self, name: str) -> bool:
        return self.takes(name) and not (self._some_experts and unit(name).endswith(".experts"))

    def entrances(self) -> list[tuple[Any, str]]:
        """Return what vLLM's runners call outside of graphs: the trunk in each step, the draft at least for prompts."""
        methods = ["forward", "compute_logits", *(["get_top_tokens"] if self.role == "draft" else [])]
        pooler = getattr(self._model, "pooler", None)  # vLLM's subclasses for embeddings and classification have one
        return [(self._model, name) for name in methods] + ([] if pooler is None else [(pooler, "forward")])

    def is_unused(self, name: str) -> bool:
        """Return whether vLLM may skip a file that holds only such tensors; it may not where the stream is checked."""
        return not self.check_first and not self.takes(name)

    def update(self, weights: Weights, copy: Copy) -> set[str]:
        with set_current_vllm_config(self._vllm_config):
            return self._update(weights, copy)

    def _update(self, weights: Weights, copy: Copy) -> set[str]:
        session = ReloadSession(self._model)
        opened_here = session.needed  # a direct call of ``load_weights`` on a live model opens none
        if opened_here or session.untouched:
            self._incomplete = {module: set() for module in self._incomplete}
            self._before = list(self._incomplete)
        self._changed, served = False, self.checkpoint
        try:
            if not isinstance(weights, list | tuple):
                self.checkpoint = read_checkpoint(self._vllm_config)
                check_checkpoint(self.checkpoint, self.config, self._vllm_config, self.mtp)
                check_update(served, self.checkpoint, quantizable(self._model))
            checked = self.checked(weights, track=opened_here or session.is_open)
            if opened_here:
                if isinstance(weights, list | tuple):
                    self._check_whole_modules(name for name, _ in weights)
                session.open()
            loaded = copy(checked)
            if opened_here:
                session.close()
            self._served_path = self._vllm_config.model_config.model
        except Exception as e:
            # vLLM would otherwise keep the refused path for later updates too.
            self._vllm_config.model_config.model, self.checkpoint = self._served_path, served
            if not session.is_open:
                unchanged = not self._changed
            elif unchanged := session.abandon():
                self._incomplete = {module: set() for module in self._before}
            if not unchanged:
                self.lose(e)
            raise
        return loaded

    def _check_whole_modules(self, names: Iterable[str]) -> None:
        incomplete: dict[str, set[str]] = {}
        for name in filter(self.takes, names):
            self.arrive(incomplete, name)
        if incomplete:
            raise ValueError(
                f"new weights found for a part of {listed(incomplete)}; vLLM has packed each of these as a whole: pass "
                "all of its tensors at once, or update through reload_weights or a weight transfer engine, which wait "
                "for the rest"
            )
