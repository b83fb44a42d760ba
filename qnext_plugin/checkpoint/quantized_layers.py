"""Decide for each layer whether it holds its weight as stored, or plain and dequantized while loading.

A layer holds one module of the checkpoint, or several merged modules. It cannot be served as stored if its parts are
stored in different ways, if packed words or blocks straddle sections or ranks, or if the engine has no kernel for it.

Layers are constructed as in any model of the engine, with a configuration of ours that decides for each layer. That
configuration is a ``view`` of the engine's own and has its type and name, because engines branch on both.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qnext_plugin.checkpoint.coverage import RefusedUpdate
from qnext_plugin.checkpoint.headers import describe
from qnext_plugin.checkpoint.layer_codes import to_codes
from qnext_plugin.checkpoint.listing import collapse
from qnext_plugin.checkpoint.merged import layer_name, parameter_of
from qnext_plugin.checkpoint.quantization import is_quantized, of_one_row, stored_modules
from qnext_plugin.checkpoint.schema import FLOAT_DTYPES
from qnext_plugin.checkpoint.stored import Checkpoint

Config = TypeVar("Config")

# The attributes of both engines' configurations that list modules to leave unquantized.
_EXCLUSIONS = (
    *("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules", "exclude_layers"),
    "modules_in_block_to_quantize",  # lists the modules to quantize; an empty list means all
)
# The errors that engines raise for a layer that a method or its kernels do not support.
_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError)


def without_exclusions(quant_config: Config) -> Config:
    """Return a copy of an engine's configuration that quantizes every layer; we decide which layers it gets."""
    view: Any = copy.copy(quant_config)
    for name in _EXCLUSIONS:
        if hasattr(view, name):
            setattr(view, name, [])
    if hasattr(view, "dynamic"):  # GPTQ's patterns with special settings; those with a minus exclude modules
        view.dynamic = {pattern: value for pattern, value in view.dynamic.items() if not pattern.startswith("-:")}
    if hasattr(view, "lm_head_quantized"):
        view.lm_head_quantized = True
    if hasattr(view, "block_name_to_quantize"):  # AutoRound's; the modules with settings of their own may be excluded
        view.block_name_to_quantize = None
        settings = {name: {"bits": view.weight_bits} | value for name, value in (view.extra_config or {}).items()}
        view.extra_config = {name: value for name, value in settings.items() if value["bits"] < 16}
        if hasattr(view, "config_parser"):  # vLLM's, which refers to the configuration
            view.config_parser = type(view.config_parser)(view)
    if isinstance(getattr(view, "quant_config", None), dict):  # Quark's
        view.quant_config = view.quant_config | {"exclude": []}
    if hasattr(view, "full_config"):  # vLLM makes another configuration for experts from it
        view.full_config = {key: value for key, value in view.full_config.items() if key not in _EXCLUSIONS}
    return view


def view_of(engine_config: Config, answers: type, /, **attributes: Any) -> Config:
    """Return a copy of an engine's configuration in which the methods of the class ``answers`` take precedence."""
    engine_class = type(engine_config)
    names = {name: getattr(engine_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    view_class = type(engine_class.__name__, (answers, engine_class), names)
    view: Any = object.__new__(view_class)
    vars(view).update(vars(engine_config) | attributes)
    return view


@dataclass(frozen=True)
class Engine:
    """The quantization methods of an engine.

    ``plain_methods`` are the method classes for floating-point weights. ``plain`` makes such a method for a layer, or
    returns None if the engine makes it itself. ``plain_arguments`` returns the arguments of its ``create_weights`` that
    differ from those for a quantized layer.
    """

    name: str
    plain_methods: tuple[type, ...]
    plain: Callable[[nn.Module], Any]
    plain_arguments: Callable[[nn.Module], dict[str, Any]] = lambda layer: {}

    def is_plain(self, layer: nn.Module) -> bool:
        """Return whether a layer's weights are floating-point."""
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
    """Return the method for a layer that is stored quantized: the engine's choice, or a plain one.

    A plain method is returned if a ``reason`` is given or if the engine refuses the layer, at once or when the method
    creates its weights. If the layer ``must_be_stored``, an error is raised instead, because dequantized the layer
    would not fit in the memory meant for it. ``quantization`` is the engine's name for the method. The layer keeps the
    reason for reports.
    """

    def refused(error: Exception) -> str:
        if must_be_stored or isinstance(error, torch.OutOfMemoryError):
            raise error
        return f"{engine.name}: {' '.join(str(error).split())}"

    def create_weights(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Run in place of the method's function for one call, because engines choose some kernels only there."""
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
    if must_be_stored:
        raise ValueError(
            f"{engine.name} cannot serve these experts as stored ({reason}), and dequantized they would not fit: take "
            "another engine, or a checkpoint in another format, such as FP8"
        )
    layer.dequantized = reason
    return engine.plain(layer)


@contextmanager
def _undone_on_error(layer: nn.Module) -> Iterator[None]:
    """If the block raises, delete the attributes and parameters that it added to ``layer``."""
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
    """Return lines that list the modules that are dequantized while loading, one line for each reason.

    ``layers`` are the layers of the model or ``draft`` that may hold a quantized weight, by name.
    """
    found: dict[str, list[str]] = {}
    for name, leaves in (checkpoint.quantized or {}).items():
        layer = layers.get(layer_name(name))
        if layer is not None and is_quantized(leaves) and name.startswith("mtp.") == draft and is_plain(layer):
            found.setdefault(getattr(layer, "dequantized", "has no quantized form here"), []).append(name)
    return [f"dequantized while loading: {'; '.join(collapse(names))} ({why})" for why, names in found.items()]


def holds_codes(layer: nn.Module) -> bool:
    """Return whether a layer's weight is served as the codes of ``codes.py``."""
    return hasattr(getattr(layer, "quant_method", None), "codes")


def converted(
    weights: Iterable[tuple[str, Tensor]],
    checkpoint: Checkpoint,
    layers: Mapping[str, nn.Module],
    is_plain: Callable[[nn.Module], bool],
    has_expert: Callable[[nn.Module, int], bool],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Turn the stored tensors of a module into those that its layer holds, and yield all others unchanged.

    A layer that ``is_plain`` holds one weight, dequantized; one of compiled products holds codes; others hold what is
    stored. Experts that this rank's layer does not have (``has_expert``) are left out. Raises ``ValueError`` at the end
    if only a part of a module arrived, and for a plain weight whose layer holds codes.
    """
    stored = checkpoint.quantized or {}
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        leaves, layer = stored.get(module, {}), layers.get(layer_name(module))
        plain_already = leaf == "weight" and describe(tensor).dtype in FLOAT_DTYPES
        is_part = leaf in leaves and is_quantized(leaves) and not plain_already
        holds = layer is not None and leaf != "bias" and holds_codes(layer)
        if holds and not is_part:
            raise ValueError(f"{name} found, expected the tensors of a quantized weight: start again with new formats")
        if not is_part or layer is None or not (holds or is_plain(layer)):
            yield name, tensor
            continue
        expert = re.search(r"\.experts\.(\d+)\.", module)
        if expert and not has_expert(layer, int(expert[1])):
            continue
        parts = held.setdefault(module, {})
        parts[leaf] = tensor
        if len(parts) < len(leaves):
            continue
        whole = held.pop(module)
        if not holds:
            yield f"{module}.weight", checkpoint.dequantize(whole).to(dtype)
        else:
            codes: Any = layer.quant_method.codes
            as_codes = to_codes(whole, codes[parameter_of(module)], checkpoint.quantization or {})
            for held_leaf, value in as_codes.items():
                yield f"{module}.{held_leaf}", value
    if held:
        raise ValueError(f"tensors are missing of quantized modules: {'; '.join(collapse(held))}; send them together")


def check_update(served: Checkpoint, new: Checkpoint, layers: Mapping[str, nn.Module]) -> None:
    """Raise ``RefusedUpdate`` if a layer that holds codes would get a weight that is stored in another way."""
    old, found = served.quantized or {}, new.quantized if new.headers is None else stored_modules(new.headers)
    other = [
        module
        for module, leaves in old.items()
        if (layer := layers.get(layer_name(module))) is not None and holds_codes(layer) and is_quantized(leaves)
        if found is not None and (module not in found or of_one_row(found[module]) != of_one_row(leaves))
    ]
    if other:
        raise RefusedUpdate(
            f"new weights of {'; '.join(collapse(other)[:8])} are not stored as those that are served, and a CPU serves"
            " them as they are stored: start with the new checkpoint"
        )
