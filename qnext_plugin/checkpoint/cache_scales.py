"""The scales for an FP8 cache of keys and values that a checkpoint stores, under every quantizer's names.

A layer has at most one scale each for queries, keys and values. They are stored as follows:

    ModelOpt            self_attn.k_proj.k_scale, self_attn.v_proj.v_scale
    compressed-tensors  self_attn.{q,k,v}_scale, and zero points that are always 0
    Quark               self_attn.{q,k,v}_proj.output_scale
    both engines        self_attn.attn.{q,k,v}_scale
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from qnext_plugin.checkpoint.headers import DTYPE_NAMES, TensorInfo

_NAME = re.compile(
    r"(?P<attention>.*\.self_attn)\."
    r"(?:(?:attn\.)?(?P<x>[qkv])_(?P<kind>scale|zero_point)|(?P<proj>[qkv])_proj\.(?:(?P=proj)|output)_scale)"
)

_SERVED = {"type": ("float",), "strategy": ("tensor", None), "symmetric": (True, None), "dynamic": (False, None)}
"""The values of ``kv_cache_scheme`` with which an engine reads one scale for each layer."""


def cache_scale(name: str) -> tuple[str, str] | None:
    """Return the attention layer and ``q_scale``, ``k_scale`` or ``v_scale`` (or ``_zero_point``) of such a tensor.

    The layer is named as in both engines: ``model.layers.3.self_attn.attn``. Returns None for all other tensors.
    """
    match = _NAME.fullmatch(name)
    return match and (f"{match['attention']}.attn", f"{match['x'] or match['proj']}_{match['kind'] or 'scale'}")


def cache_scales(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the stored name of each scale (and zero point) by layer and kind, as ``cache_scale`` names them."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if scale := cache_scale(name):
            found.setdefault(scale[0], {})[scale[1]] = name
    return found


def misshapen_scales(headers: Mapping[str, TensorInfo]) -> list[str]:
    """Return a line for each scale that is not a single number, such as those of FP8 with a scale for each head."""
    return [
        f"{name} {info.dtype} {list(info.shape)}, expected one floating-point number for the layer"
        for name, info in headers.items()
        if (scale := cache_scale(name))
        and scale[1].endswith("_scale")
        and (math.prod(info.shape) != 1 or info.dtype not in DTYPE_NAMES.values())
    ]


def check_cache_scales(names: Collection[str], quantization: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` for scales that are incomplete, or of another format than the engines read."""
    found, kinds = cache_scales(names), Counter(scale for name in names if (scale := cache_scale(name)))
    if twice := [".".join(scale) for scale, count in kinds.items() if count > 1]:
        raise ValueError(f"{twice[0]} is stored under two names; remove one of them from the checkpoint")
    for layer, scales in found.items():
        if ("k_scale" in scales) != ("v_scale" in scales):
            raise ValueError(
                f"{' and '.join(scales.values())} found, expected one scale each for the keys and values of {layer}; "
                "download the checkpoint again"
            )
    if found and quantization is None:
        example = next(iter(next(iter(found.values())).values()))
        raise ValueError(
            f"checkpoint has scales for a cache of keys and values ({example}), but config.json has no "
            "quantization_config; take config.json from where the weights came from"
        )
    scheme = _settings(quantization).get("kv_cache_scheme")
    if found and isinstance(scheme, Mapping):
        wrong = {key: scheme[key] for key, served in _SERVED.items() if key in scheme and scheme[key] not in served}
        if wrong:
            raise ValueError(
                f"kv_cache_scheme with {wrong} found, expected static symmetric floating-point numbers with one scale "
                "for each layer; quantize keys and values in this way, or remove kv_cache_scheme and the scales"
            )


def asks_for_fp8_cache(quantization: Mapping[str, Any] | None) -> bool:
    """Return whether a checkpoint's description of its quantization asks for keys and values in FP8."""
    settings = _settings(quantization)
    scheme = settings.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) and not scheme.get("dynamic")
    return str(scheme or settings.get("kv_cache_quant_algo")).upper() == "FP8"


def _settings(quantization: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the settings themselves; ModelOpt's own file nests them."""
    return (quantization or {}).get("quantization", quantization or {})


def for_attention(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give the scales their names in the engines' attention layers, and pass other tensors on.

    Zero points are left out, because no engine reads them; ``check_cache_scales`` refuses a scheme that needs them.
    Raises ``ValueError`` for a scale that engines would take for a missing one.
    """
    for name, tensor in weights:
        scale = cache_scale(name)
        if scale is None:
            yield name, tensor
        elif scale[1].endswith("_scale"):
            if not 0 < tensor.item() < math.inf:
                raise ValueError(f"{name} is {tensor.item()}, expected more than 0; download the checkpoint again")
            yield ".".join(scale), tensor
