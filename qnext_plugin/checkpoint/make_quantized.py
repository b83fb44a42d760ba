"""Make quantized test checkpoints in the published formats, rounded to nearest and packed by compressed-tensors.

No calibration data is read, so the accuracy is that of plain rounding. The checkpoints serve to test that a server
reads each format correctly; for that the values do not matter.
"""

import json
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.headers import INDEX_FILE, Shape, read_headers
from qnext_plugin.checkpoint.quantization import check_quantization
from qnext_plugin.checkpoint.quantizers import FORMATS, Leaves
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig

# A pattern for the whole names of the modules that the published checkpoints do not quantize.
IGNORE = r".*\.(embed_tokens|conv1d|in_proj_ba|gate|shared_expert_gate)|lm_head|mtp\.fc"


class Quantization:
    """Which modules of a checkpoint are stored in a format, and how.

    ``shapes`` are those of the unquantized checkpoint's tensors by name. ``format``, ``group_size`` and ``ignore`` are
    those of ``quantize_checkpoint``. Raises ``ValueError`` for an unknown format, and if the group size does not divide
    a module's inputs.
    """

    def __init__(self, shapes: Mapping[str, Shape], format: str, group_size: int = 32, ignore: str = IGNORE) -> None:
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        self._format, self._scheme = FORMATS[format], FORMATS[format].scheme(group_size)
        linear = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        ignored = {module for module in linear if re.fullmatch(ignore, module)}
        self._chosen = {module: shape for module, shape in linear.items() if module not in ignored}
        self._ignored = sorted(ignored)
        size = self._scheme.weights.group_size or 1
        odd = [f"{module} {list(shape)}" for module, shape in sorted(self._chosen.items()) if shape[1] % size]
        if odd:
            raise ValueError(
                f"group size {size} does not divide the inputs of {odd[0]} and {len(odd) - 1} more modules"
            )

    def config(self) -> dict[str, Any]:
        """Return the ``quantization_config``."""
        return self._format.config(self._scheme, self._ignored)

    def stored(self, name: str, weight: Tensor) -> Leaves:
        """Return the tensors that store a weight, by name; only the weight itself where its module is not quantized."""
        module = name.removesuffix(".weight")
        if module not in self._chosen:
            return {name: weight}
        leaves = self._format.leaves(weight, self._scheme)
        return {f"{module}.{leaf}": value.contiguous() for leaf, value in leaves.items()}

    def layout(self, dtype: torch.dtype) -> dict[str, Leaves]:
        """Return, for each quantized weight of ``dtype``, the tensors of ``stored`` without data."""

        @cache
        def leaves(shape: Shape) -> Leaves:
            # What a weight is stored as depends on its shape alone.
            made = self._format.leaves(torch.randn(shape, dtype=dtype), self._scheme)
            return {leaf: value.to("meta") for leaf, value in made.items()}

        return {
            f"{module}.weight": {f"{module}.{leaf}": value for leaf, value in leaves(shape).items()}
            for module, shape in self._chosen.items()
        }


def quantize_checkpoint(
    source: str | Path, target: str | Path, *, format: str, group_size: int = 32, ignore: str = IGNORE
) -> None:
    """Write ``source``, an unquantized local checkpoint, to the new directory ``target`` in ``format``.

    ``format`` is one of ``FORMATS``. ``group_size`` applies to formats with groups of inputs. ``ignore`` is a pattern
    for the whole names of modules that stay unquantized. One file of the source is in memory at a time. Raises
    ``ValueError`` for an unknown format, for a source that is incomplete or already quantized, and if the group size
    does not divide a module's inputs.
    """
    source, target = Path(source), Path(target)
    config, headers = QNextConfig.from_pretrained(source), read_headers(source)
    check_coverage(config, headers)
    raw = json.loads((source / "config.json").read_text())
    if "quantization_config" in raw:
        raise ValueError(f"{source}: has a quantization_config already; start from the unquantized checkpoint")
    check_quantization(headers, None, {})
    shapes = {name: headers[name].shape for name in expected_tensors(config) if name in headers}
    quantization = Quantization(shapes, format, group_size, ignore)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target}: expected an empty or new directory; choose another or delete it")
    target.mkdir(parents=True, exist_ok=True)

    weight_map: dict[str, str] = {}
    for file in sorted({info.file for info in headers.values()}):
        out: Leaves = {}
        for name, tensor in load_file(file).items():
            out |= quantization.stored(name, tensor)
        save_file(out, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(out, file.name)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX_FILE and file.is_file():
            shutil.copy(file, target)
    if (source / INDEX_FILE).exists():
        (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    raw["quantization_config"] = quantization.config()
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
