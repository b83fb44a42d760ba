"""The first load of a model and every later one, into a model that serves.

vLLM packs weights as it loads them. To load again, it opens a session in which a module's tensors are collected until
all of them are there, then packed and copied over the old ones. Here they are checked before that: what does not fit
changes nothing, and a model left with a mix of old and new weights stops serving.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config

from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.schema import UpdateCheck, check_stream, expected_tensors
from qnext_plugin.checkpoint.stored import Checkpoint
from qnext_plugin.config import QNextConfig
from vllm_ext.compat import ReloadSession
from vllm_ext.quantization import read_checkpoint
from vllm_ext.weights import check_checkpoint, is_draft, is_trunk, unit

Weights = Iterable[tuple[str, torch.Tensor]]


class Loading:
    """The loads of one model: of the trunk, or of the draft where ``mtp`` is required."""

    def __init__(
        self,
        model: nn.Module,
        config: QNextConfig,
        vllm_config: VllmConfig,
        checkpoint: Checkpoint,
        mtp: Literal["required", "optional"] = "optional",
    ) -> None:
        self._model, self._config, self._vllm_config, self._mtp = model, config, vllm_config, mtp
        self.checkpoint = checkpoint  # the one that is served, or being loaded
        # Nothing is known of what follows dummy weights: updates may bring a few tensors at a time.
        self._first = vllm_config.load_config.load_format != "dummy"
        self._takes = is_draft if mtp == "required" else is_trunk
        # Of the experts the loader may pass on this rank's only.
        self._some_experts = vllm_config.parallel_config.enable_ep_weight_filter
        self._whole_stream = not (check_checkpoint(checkpoint, config, vllm_config, mtp) or self._some_experts)
        self._served_path = vllm_config.model_config.model
        self._incomplete: dict[str, set[str]] = {}  # modules that wait for new weights, and what came for each
        self._reason = ""

    @cached_property
    def _check(self) -> UpdateCheck:
        return UpdateCheck(self._config)

    @cached_property
    def _forms(self) -> list[dict[str, set[str]]]:
        """The tensors of each module, in either form that a layer may be stored in."""
        forms: list[dict[str, set[str]]] = [{}, {}]
        for form, other in zip(forms, (False, True), strict=True):
            for name in filter(self._takes, expected_tensors(self._config, split_in_proj=other, fused_experts=other)):
                if not (self._some_experts and unit(name).endswith(".experts")):
                    form.setdefault(unit(name), set()).add(name)
        return forms

    def is_unused(self, name: str) -> bool:
        """Whether vLLM may leave out a file of nothing but such tensors: not where the stream is what is checked."""
        return not self._whole_stream and not self._takes(name)

    def check_complete(self) -> None:
        """``RuntimeError`` where an update has left a mix of old and new weights."""
        if self._incomplete:
            raise RuntimeError(
                f"the last weight update is incomplete{self._reason}; these are without new weights, or with a part of "
                f"them: {listed(self._incomplete)}. Load a whole checkpoint, or start again"
            )

    def load(self, weights: Weights, copy: Callable[[Weights], set[str]]) -> set[str]:
        """Check ``weights``, ``copy`` them into the model; returns the parameters loaded.

        A ``ValueError`` before anything is copied leaves the model as it was.
        """
        if self._first:
            loaded = copy(check_stream(weights, self._config, self._mtp) if self._whole_stream else weights)
            self._first = False
            return loaded
        with set_current_vllm_config(self._vllm_config):
            return self._reload(weights, copy)

    def _reload(self, weights: Weights, copy: Callable[[Weights], set[str]]) -> set[str]:
        session = ReloadSession(self._model)
        opened_here = session.needed  # whoever calls ``load_weights`` of a live model itself has opened none
        if opened_here or session.untouched:
            for arrived in self._incomplete.values():
                arrived.clear()
        self._passed_on, served = False, self.checkpoint
        try:
            if isinstance(weights, list | tuple):
                self._check(weights)
                if opened_here:
                    self._check_whole_modules(name for name, _ in weights)
            else:
                self.checkpoint = read_checkpoint(self._vllm_config)
                check_checkpoint(self.checkpoint, self._config, self._vllm_config)
            if opened_here:
                session.open()
            loaded = copy(self._watch(weights, track=session.is_open))
            if opened_here:
                session.close()
            self._served_path = self._vllm_config.model_config.model
        except Exception as e:
            # vLLM keeps the path that it was given, for later updates too.
            self._vllm_config.model_config.model, self.checkpoint = self._served_path, served
            unchanged = session.abandon() if session.is_open else not self._passed_on
            if not unchanged:
                self._incomplete, self._reason = {module: set() for module in self._forms[0]}, f" ({e})"
            raise
        return loaded

    def _watch(self, weights: Weights, track: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._check([(name, tensor)])
            self._passed_on = True
            if track or self._incomplete:
                self._arrive(self._incomplete, name)
            yield name, tensor

    def _arrive(self, incomplete: dict[str, set[str]], name: str) -> None:
        module = unit(name)
        arrived = incomplete.setdefault(module, set())
        arrived.add(name)
        if any(form.get(module, set()) <= arrived for form in self._forms):
            del incomplete[module]

    def _check_whole_modules(self, names: Iterable[str]) -> None:
        incomplete: dict[str, set[str]] = {}
        for name in names:
            self._arrive(incomplete, name)
        if incomplete:
            raise ValueError(
                f"new weights found for a part of {listed(incomplete)}; vLLM has packed each of these as a whole: pass "
                "all of its tensors at once, or update through reload_weights or a weight transfer engine, which wait "
                "for the rest"
            )


def listed(modules: Iterable[str]) -> str:
    patterns = collapse(sorted(modules))
    return "; ".join(patterns[:8]) + (f"; and {len(patterns) - 8} more" if len(patterns) > 8 else "")
