"""A guard around every load of a model: the first load, and each update of a model that serves.

An update is checked before any of it is copied, so an update that does not fit changes nothing. If an update leaves a
mix of old and new weights, the model stops serving until the missing weights arrive.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, wraps
from typing import Any, Literal

import torch

from qnext_plugin.checkpoint.cache_scales import cache_scale
from qnext_plugin.checkpoint.coverage import UpdateCheck, check_stream
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.schema import PACKED_WEIGHTS, QUANT_COMPANIONS, both_forms
from qnext_plugin.config import QNextConfig

Role = Literal["trunk", "draft"]
Weights = Iterable[tuple[str, torch.Tensor]]
Copy = Callable[[Weights], set[str]]


class LoadGuard(ABC):
    """The guard of one model's loads. Each engine has a subclass that knows how the engine loads and calls the model.

    If ``drafts_required``, a whole checkpoint must have the draft's tensors. If ``is_first``, the next load is the
    model's first and brings a whole checkpoint. After a start with dummy weights ``is_first`` is false: updates may
    bring a few tensors at a time.
    """

    check_first = False
    """If true, the tensors of the first load are checked, because the checkpoint's headers could not be checked."""

    def __init__(self, config: QNextConfig, role: Role, *, drafts_required: bool, is_first: bool) -> None:
        self.config, self.role, self.is_first = config, role, is_first
        self.mtp: Literal["required", "optional"] = "required" if drafts_required else "optional"
        self._changed = False  # whether the current update has copied anything
        self._incomplete: dict[str, set[str]] = {}  # modules that wait for new weights, and the tensors that arrived
        self._reason = ""
        self._stopped: list[tuple[Any, str, Any]] = []

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Return whether a checkpoint's tensor is copied into this model."""

    @abstractmethod
    def module(self, name: str) -> str:
        """Return the model's module that a checkpoint's tensor belongs to."""

    @abstractmethod
    def entrances(self) -> list[tuple[Any, str]]:
        """Return the objects and method names that the engine calls in a step, outside of captured graphs."""

    def load(self, weights: Weights, copy: Copy) -> set[str]:
        """Check ``weights`` and ``copy`` them into the model; returns the names of the loaded parameters.

        An update that raises ``RefusedUpdate`` before anything is copied leaves the model unchanged.
        """
        if self.is_first:
            loaded = copy(check_stream(weights, self.config, self.mtp) if self.check_first else weights)
            self.is_first = False
            return loaded
        try:
            return self.update(weights, copy)
        finally:
            self._stop_or_serve()

    def update(self, weights: Weights, copy: Copy) -> set[str]:
        """Load new weights. A list of tensors is checked as a whole before any is copied; others one by one."""
        try:
            return copy(self.checked(weights, track=False))
        except Exception as e:
            if self._changed:
                self.lose(e)
            raise

    def checked(self, weights: Weights, *, track: bool) -> Weights:
        """Return ``weights``, checked before they are copied.

        If ``track``, a module that gets a tensor counts as incomplete until its other tensors arrive.
        """
        whole = isinstance(weights, list | tuple)
        if whole:
            self._check(weights)
        return self._pass_on(weights, check=not whole, track=track)

    def _pass_on(self, weights: Weights, *, check: bool, track: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if check:
                self._check([(name, tensor)])
            if self.takes(name):
                self._changed = True
                if track or self._incomplete:
                    self.arrive(self._incomplete, name)
            yield name, tensor

    def lose(self, reason: Exception) -> None:
        """Wait for new weights of every module, because an update failed halfway."""
        self._incomplete, self._reason = {module: set() for module in self._expected[0]}, f" ({reason})"

    def arrive(self, incomplete: dict[str, set[str]], name: str) -> None:
        """Record in ``incomplete`` that a tensor has arrived; a module's last weight removes the module from it.

        Scales are not awaited, because the checkpoint's format decides which scales a module has.
        """
        owner, _, leaf = name.rpartition(".")
        if leaf in QUANT_COMPANIONS or cache_scale(name):
            return
        module = self.module(name)
        arrived = incomplete.setdefault(module, set())
        arrived.add(f"{owner}.weight" if leaf in PACKED_WEIGHTS else name)
        if any(form.get(module, set()) <= arrived for form in self._expected):
            del incomplete[module]

    def awaits(self, name: str) -> bool:
        """Return whether a module is incomplete without this tensor of the checkpoint."""
        return self.takes(name)

    @cached_property
    def _check(self) -> UpdateCheck:
        return UpdateCheck(self.config)

    @cached_property
    def _expected(self) -> list[dict[str, set[str]]]:
        """The tensors of each module, in each of the two forms in which a layer may be stored."""
        forms: list[dict[str, set[str]]] = []
        for names in both_forms(self.config):
            forms.append({})
            for name in filter(self.awaits, names):
                forms[-1].setdefault(self.module(name), set()).add(name)
        return forms

    def _stop_or_serve(self) -> None:
        """Replace the entrances by functions that raise while the model is incomplete; restore them afterwards.

        This costs a step nothing, and it also stops steps that replay a graph, which would skip a check in ``forward``.
        """
        while self._stopped:
            owner, name, own = self._stopped.pop()
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        if self._incomplete:
            message = (
                f"the last weight update is incomplete{self._reason}; these are without new weights, or with a part of "
                f"them: {listed(self._incomplete)}. Load a whole checkpoint, or start again"
            )
            for owner, name in self.entrances():
                self._stopped.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, _refusing(getattr(owner, name), message))
        else:
            self._reason = ""


def _refusing(method: Callable[..., Any], message: str) -> Callable[..., Any]:
    @wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(message)

    return refuse


def listed(modules: Iterable[str]) -> str:
    """Return up to eight names or patterns of names, for a message."""
    patterns = collapse(sorted(modules))
    return "; ".join(patterns[:8]) + (f"; and {len(patterns) - 8} more" if len(patterns) > 8 else "")
