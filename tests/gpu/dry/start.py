"""What the dry runs of both engines do: write a checkpoint without weights, and record a start."""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from qnext_plugin.checkpoint import make_random
from tests.gpu.dry import scales
from tests.gpu.dry.trace import TRACE, compact


def write_checkpoint(directory: Path, preset: str, overrides: dict[str, Any]) -> None:
    """Write a configuration and a tokenizer; an engine that loads dummies needs no weights."""
    keys = {name: value for name, value in overrides.items() if name != "quantization_config"}
    config = make_random._raw_config(preset, "bfloat16", "published", keys) | overrides
    make_random._write_tokenizer(directory, config["max_position_embeddings"])
    (directory / "config.json").write_text(json.dumps(config))


def serve_without_weights(
    preset: str, overrides: dict[str, Any], serve: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), preset, overrides)
        return serve(Path(directory))


def stored(k: str, v: str) -> dict[str, Any]:
    """Return how many layers each of the engine's classes for quantized weights serves, and ``scales.used``."""
    methods = [getattr(layer, "quant_method", None) for model in TRACE.models for layer in model.modules()]
    names = [type(method).__name__ for method in methods if method is not None]
    classes = Counter(name for name in names if not name.startswith("Unquantized") and "KVCache" not in name)
    return {"classes": dict(sorted(classes.items())), "cache": scales.used(k, v)}


def record(out: Path, serve: Callable[[], dict[str, Any]]) -> NoReturn:
    """Call ``serve``, write to ``out`` what it returned, what it launched and why it failed, and end the process."""
    served: dict[str, Any] = {}
    failure = ""
    try:
        served = serve()
    except BaseException as e:  # the report says why
        error: BaseException | None = e
        while error is not None:
            failure += compact(error) + "\n"
            error = error.__cause__ or error.__context__
    print(failure)
    report = {
        "arguments": sys.argv[1:],
        "failure": failure,
        "served": served,
        "kernels": list(TRACE.kernels.values()),
        "launches": [asdict(launch) for launch in TRACE.launches],
        "events": [asdict(event) for event in TRACE.events],
    }
    out.write_text(json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(failure))  # what CUDA libraries do at exit needs a driver
