"""How each layer of a model holds its weight: as the checkpoint stores it, or plain, dequantized while loading.

A layer holds one module of the checkpoint or several, merged. It cannot be served as stored where its parts are stored
in different ways, where packed words or blocks straddle sections or ranks, or where the engine has no kernel for it.

Layers are constructed as in any model of the engine, with a configuration of ours that answers for each of them. That
is a ``view`` of the engine's own configuration, of the same type and name, because engines branch on both.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qnext_plugin.checkpoint.headers import describe
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.merged import layer_name
from qnext_plugin.checkpoint.quantization import is_quantized
from qnext_plugin.checkpoint.schema import FLOAT_DTYPES
from qnext_plugin.checkpoint.stored import Checkpoint

Config = TypeVar("Config")

# The lists of modules to leave alone that both engines' configurations of the various methods hold.
_EXCLUSIONS = (
    *("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"),
    "modules_in_block_to_quantize",  # a list of those to quantize, where empty means all
)
# What engines raise for a layer that a method or its kernels cannot take.
_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError)


def without_exclusions(quant_config: Config) -> Config:
    """A copy of an engine's configuration that quantizes every layer it is given: whether to is decided already."""
    view: Any = copy.copy(quant_config)
    for name in _EXCLUSIONS:
        if hasattr(view, name):
            setattr(view, name, [])
    if hasattr(view, "dynamic"):  # GPTQ: patterns with settings of their own, or with a minus to leave alone
        view.dynamic = {pattern: value for pattern, value in view.dynamic.items() if not pattern.startswith("-:")}
    if hasattr(view, "lm_head_quantized"):
        view.lm_head_quantized = True
    if hasattr(view, "full_config"):  # vLLM makes another configuration of it for experts
        view.full_config = {key: value for key, value in view.full_config.items() if key not in _EXCLUSIONS}
    return view


def view_of(engine_config: Config, answers: type, /, **attributes: Any) -> Config:
    """A copy of an engine's configuration in which the methods of the class ``answers`` come before its own."""
    engine_class = type(engine_config)
    names = {name: getattr(engine_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    view_class = type(engine_class.__name__, (answers, engine_class), names)
    view: Any = object.__new__(view_class)
    vars(view).update(vars(engine_config) | attributes)
    return view


@dataclass(frozen=True)
class Engine:
    """What an engine's quantization methods are.

    ``plain_methods`` are the classes of those that hold floating-point weights. ``plain`` makes such a method for a
    layer, or None where the engine makes it itself. ``plain_arguments`` are those for its ``create_weights`` that
    differ from the ones for a quantized layer.
    """

    name: str
    plain_methods: tuple[type, ...]
    plain: Callable[[nn.Module], Any]
    plain_arguments: Callable[[nn.Module], dict[str, Any]] = lambda layer: {}

    def is_plain(self, layer: nn.Module) -> bool:
        """Whether a layer's weights are floating-point."""
        method = getattr(layer, "quant_method", None)
        return method is None or isinstance(method, self.plain_methods)


def choose_method(
    engine: Engine,
    layer: nn.Module,
    reason: str | None,
    choose: Callable[[], Any],
    *,
    quantization: str,
    must_be_stored: bool,
) -> Any:
    """The method for a layer that is stored quantized: the engine's choice, or a plain one for a ``reason``.

    Besides a ``reason`` that is given, the engine may refuse the layer, at once or when the method creates its weights.
    That error is raised if the layer ``must_be_stored``: dequantized it would not fit where it was meant to.
    ``quantization`` is the engine's name for the method. The reason is kept at the layer, for reports.
    """

    def refused(error: Exception) -> str:
        if must_be_stored or isinstance(error, torch.OutOfMemoryError):
            raise error
        return f"{engine.name}: {' '.join(str(error).split())}"

    def create_weights(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Stands before the method's own for one call: engines choose some kernels only there."""
        del method.create_weights
        try:
            with _undone_on_error(layer):
                method.create_weights(layer, *args, **kwargs)
        except _REFUSALS as e:
            layer.dequantized = refused(e)
            vars(layer).pop("scheme", None)
            layer.quant_method = engine.plain(layer)
            layer.quant_method.create_weights(layer, *args, **kwargs | engine.plain_arguments(layer))

    if reason is None:
        try:
            with _undone_on_error(layer):
                method = choose()
        except _REFUSALS as e:
            reason = refused(e)
        else:
            if method is not None and not isinstance(method, engine.plain_methods):
                method.create_weights = create_weights
                return method
            reason = f"{engine.name} has no {quantization} method for it"
    layer.dequantized = reason
    return engine.plain(layer)


@contextmanager
def _undone_on_error(layer: nn.Module) -> Iterator[None]:
    """Take from ``layer`` what has been put there, where that ends in an error."""
    attributes, parameters = set(vars(layer)), set(layer._parameters)
    try:
        yield
    except Exception:
        for name in vars(layer).keys() - attributes:
            delattr(layer, name)
        for name in layer._parameters.keys() - parameters:
            delattr(layer, name)
        raise


def reports(
    checkpoint: Checkpoint, layers: Mapping[str, nn.Module], is_plain: Callable[[nn.Module], bool], *, draft: bool
) -> list[str]:
    """Lines that say which modules are dequantized while loading, one for each reason.

    ``layers`` are those of the model or ``draft`` that may hold a quantized weight, by name.
    """
    found: dict[str, list[str]] = {}
    for name, leaves in (checkpoint.quantized or {}).items():
        layer = layers.get(layer_name(name))
        if layer is not None and is_quantized(leaves) and name.startswith("mtp.") == draft and is_plain(layer):
            found.setdefault(getattr(layer, "dequantized", "has no quantized form here"), []).append(name)
    return [f"dequantized while loading: {'; '.join(collapse(names))} ({why})" for why, names in found.items()]


def dequantized(
    weights: Iterable[tuple[str, Tensor]],
    checkpoint: Checkpoint,
    layers: Mapping[str, nn.Module],
    is_plain: Callable[[nn.Module], bool],
    has_expert: Callable[[nn.Module, int], bool],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Turn the stored tensors of each module whose layer ``is_plain`` into one weight; pass the others on.

    Experts that this rank's layer has not (``has_expert``) are left out. ``ValueError`` at the end for modules of which
    a part came.
    """
    stored = checkpoint.quantized or {}
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        plain_already = leaf == "weight" and describe(tensor).dtype in FLOAT_DTYPES
        leaves, layer = stored.get(module, {}), layers.get(layer_name(module))
        if plain_already or leaf not in leaves or not is_quantized(leaves) or layer is None or not is_plain(layer):
            yield name, tensor
            continue
        expert = re.search(r"\.experts\.(\d+)\.", module)
        if expert and not has_expert(layer, int(expert[1])):
            continue
        parts = held.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) == len(leaves):
            yield f"{module}.weight", checkpoint.dequantize(held.pop(module)).to(dtype)
    if held:
        raise ValueError(f"tensors are missing of quantized modules: {'; '.join(collapse(held))}; send them together")
