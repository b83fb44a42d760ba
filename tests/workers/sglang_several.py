"""A checkpoint served, then others in the same engine."""

from pathlib import Path
from typing import Any

from qnext_plugin.verify.scenarios import Scenario
from sglang_ext.tools.engine import Engine


def serve(engine: Engine, models: list[str], scenarios: list[dict[str, Any]], directory: str) -> None:
    """Answer ``scenarios``, each given by its fields, with the first of ``models``, which the engine has loaded, and
    with each of the others loaded over it, into ``DIRECTORY/<model>.<scenario>.safetensors``, both by number."""
    for n, model in enumerate(models):
        if n:
            success, message, *_ = engine.engine.update_weights_from_disk(model)
            assert success, message
        for i, scenario in enumerate(scenarios):
            engine.run(Scenario(**scenario), reset=True).save(Path(directory) / f"{n}.{i}.safetensors")
