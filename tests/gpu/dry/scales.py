"""The scales of a cache in FP8: what the operators that write and read the cache are handed."""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.gpu.dry.tensors import host
from tests.gpu.dry.trace import TRACE

Scale = tuple[int, float | None] | None  # address and value
LAYERS: list[str] = []  # the attention layers that run outside of their module's call
USES: dict[str, dict[str, set[tuple[str, Scale, Scale]]]] = {}


def use(operator: str, cache: Any, k: Tensor | None, v: Tensor | None) -> None:
    """Note that ``operator`` is handed these scales for a cache of this type by the attention layer that runs."""
    found = USES.setdefault((LAYERS or TRACE.modules)[-1], {}).setdefault(operator, set())
    found.add((str(cache).removeprefix("torch."), _scale(k), _scale(v)))


def _scale(x: Tensor | None) -> Scale:
    if x is None:
        return None
    with unset_fake_temporarily():  # the operator that is handed it is called with fake tensors only
        value = host(x)
        return x.data_ptr(), None if value is None else value.flatten()[0].item()


def used(k: str, v: str) -> dict[str, dict[str, list[str]]]:
    """Return the cache's type and the scales by attention layer and operator.

    ``k`` and ``v`` are the layer's attributes with the scales. "of a copy" follows a scale that is not the layer's own
    tensor, which an update of the weights writes.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for layer in (layer for model in TRACE.models for layer in model.modules()):
        name = TRACE.names[id(layer)]
        if name in USES:
            own = {x: getattr(layer, attribute).data_ptr() for x, attribute in (("k", k), ("v", v))}
            for operator, uses in sorted(USES[name].items()):
                texts = {f"{cache}, {_text('k', first, own)}, {_text('v', last, own)}" for cache, first, last in uses}
                found.setdefault(name, {})[operator] = sorted(texts)
    return found


def _text(x: str, given: Scale, own: dict[str, int]) -> str:
    if given is None:
        return f"no {x}"
    address, value = given
    return f"{x} {value}" + ("" if address == own[x] else " of a copy")
