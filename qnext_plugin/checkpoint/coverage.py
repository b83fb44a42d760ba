"""Checks that a checkpoint's headers, and new weights for a running model, are those of its configuration."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch

from qnext_plugin.checkpoint.cache_scales import cache_scale, misshapen_scales
from qnext_plugin.checkpoint.headers import Shape, TensorInfo, describe
from qnext_plugin.checkpoint.listing import listing
from qnext_plugin.checkpoint.schema import (
    BYTE_DTYPES,
    FLOAT_DTYPES,
    PACKED_WEIGHTS,
    QUANT_COMPANIONS,
    expected_for,
    weight_shapes,
)
from qnext_plugin.config import QNextConfig


def check_coverage(
    config: QNextConfig, headers: Mapping[str, TensorInfo], *, mtp: Literal["required", "optional"] = "optional"
) -> None:
    """Raise one ``ValueError`` that lists every missing, unexpected or wrongly shaped tensor.

    Each layer may store its input projections merged or split, and its experts one by one or fused. All of ``mtp.*``
    may be absent unless it is required; a tied ``lm_head`` may be absent. A module may be quantized: its packed weight
    and scales are accepted, and the shapes of packed weights are not checked.
    """
    names = {name for name in headers if not _is_ignored(name)}
    has_draft = any(n.split(".")[0] == "mtp" for n in names)
    if mtp == "required" and not has_draft:
        raise ValueError(
            "drafts are requested, and the checkpoint has no mtp.* tensors to draft with; take a checkpoint that has "
            "them, draft with n-grams or an EAGLE3 head, or drop the flags that turn on speculation"
        )
    _check_routers(config, headers)
    layers = len({n.split(".")[2] for n in names if n.startswith("mtp.layers.")})
    if layers not in (0, config.num_nextn_predict_layers):
        if mtp == "required":
            raise ValueError(
                f"the draft has {layers} layers in mtp.*, and config.json says num_nextn_predict_layers "
                f"{config.num_nextn_predict_layers}; correct config.json, or drop the flags that turn on speculation"
            )
        config = replace(config, num_nextn_predict_layers=layers)
    expected = expected_for(config, names, has_draft)
    linear, attention = _quantizable(expected)

    missing = [f"{n} {list(shape)}" for n, shape in expected.items() if not _is_present(n, shape, names)]
    unexpected = [n for n in sorted(names - expected.keys()) if not _is_quantized(n, linear, attention)]
    if problems := _problems(missing, unexpected, _misshapen(expected, headers)):
        advice = "compare config.json with the checkpoint, then download or convert the weights again"
        if files := sorted({headers[name].file.name for name in unexpected} - {""}):
            problems += "\n" + listing("files with unexpected tensors:", files)
            advice += ", or move a file away that is no part of it"
        raise ValueError(f"checkpoint does not match config.json:\n{problems}\n{advice}")


def _check_routers(config: QNextConfig, headers: Mapping[str, TensorInfo]) -> None:
    """Raise ``ValueError`` if the routers of the trunk have another number of experts than config.json, or several."""
    prefixes = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    routers = {prefix: f"{prefix}.mlp.gate.weight" for prefix in prefixes}
    shapes = {prefix: headers[name].shape for prefix, name in routers.items() if name in headers}
    found = {prefix: shape[0] for prefix, shape in shapes.items() if len(shape) == 2}
    counts = sorted(set(found.values()))
    if len(counts) > 1:
        examples = ", ".join(f"{count} in {next(p for p in found if found[p] == count)}" for count in counts[:3])
        raise ValueError(
            f"the number of experts differs between layers ({examples}), expected num_experts {config.num_experts} in "
            "every one; take a checkpoint whose layers are all pruned to the same number"
        )
    if counts and counts != [config.num_experts]:
        raise ValueError(
            f"the routers have {counts[0]} experts, and config.json says num_experts {config.num_experts}; correct "
            "config.json, or download it with the weights again"
        )


class RefusedUpdate(ValueError):
    """Raised for new weights that do not fit, before they are copied."""


class UpdateCheck:
    """A check of new weights for a running model. Call it with all or some weights, before any is copied.

    It raises one ``RefusedUpdate`` that lists every tensor that no checkpoint of this configuration has in that shape.
    Its cost grows with the number of given tensors, not with the size of the model.
    """

    def __init__(self, config: QNextConfig) -> None:
        self._expected = weight_shapes(config)
        self._linear, self._attention = _quantizable(self._expected)

    def __call__(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        headers = {name: describe(tensor) for name, tensor in weights if not _is_ignored(name)}
        unknown = [n for n in headers if n not in self._expected]  # subtracting keys would visit every expected name
        unexpected = sorted(n for n in unknown if not _is_quantized(n, self._linear, self._attention))
        if problems := _problems([], unexpected, _misshapen(self._expected, headers)):
            raise RefusedUpdate(f"new weights do not match config.json:\n{problems}\nsend them again in its shapes")


def check_stream(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: QNextConfig,
    mtp: Literal["required", "optional"] = "optional",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a whole checkpoint's tensors unchanged, and check them.

    Raises ``ValueError`` at a repeated tensor, and at the end for missing or unknown tensors.
    """
    seen: dict[str, TensorInfo] = {}
    for name, tensor in weights:
        if name in seen:
            raise ValueError(f"tensor {name} comes twice in this checkpoint; write the checkpoint again")
        seen[name] = describe(tensor)
        yield name, tensor
    check_coverage(config, seen, mtp=mtp)


def _quantizable(expected: Mapping[str, Shape]) -> tuple[set[str], set[str]]:
    """Return the linear modules and the attention modules, which may have scales.

    Only matrices are quantized; norms, the convolution and A_log are not.
    """
    linear = {n.removesuffix(".weight") for n, shape in expected.items() if n.endswith(".weight") and len(shape) == 2}
    return linear, {m.removesuffix(".q_proj") for m in linear if m.endswith(".self_attn.q_proj")}


def _is_quantized(name: str, linear: Container[str], attention: Container[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    scale = cache_scale(name)
    in_attention = scale is not None and scale[0].removesuffix(".attn") in attention
    return in_attention or (module in linear and leaf in (*PACKED_WEIGHTS, *QUANT_COMPANIONS))


def _misshapen(expected: Mapping[str, Shape], headers: Mapping[str, TensorInfo]) -> list[str]:
    return misshapen_scales(headers) + [
        f"{n} {list(found.shape)}, expected {list(expected[n])}"
        for n, found in headers.items()
        if n in expected and found.dtype in (*FLOAT_DTYPES, *BYTE_DTYPES) and found.shape != expected[n]
    ]


def _problems(missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    found = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    return "\n".join(listing(label, lines) for label, lines in found.items() if lines)


def _is_present(name: str, shape: Shape, names: set[str]) -> bool:
    if name in names:
        return True
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and len(shape) == 2 and any(f"{module}.{packed}" in names for packed in PACKED_WEIGHTS)


def _is_ignored(name: str) -> bool:
    """Return whether a tensor holds rotary frequencies, which old checkpoints store; config.json implies them."""
    return name.split(".")[-2:] == ["rotary_emb", "inv_freq"]
