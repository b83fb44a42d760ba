"""The test's side of ``vllm_several``."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines import process
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Result
from qnext_plugin.verify.scenarios import Scenario


def case(model: Path, config: EngineConfig, scenarios: tuple[Scenario, ...], **args: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "config": asdict(config),
        "args": args,
        "scenarios": [asdict(scenario) for scenario in scenarios],
    }


def serve(
    directory: Path, cases: Mapping[str, Any], env: Mapping[str, str] = MappingProxyType({}), timeout: float = 900
) -> dict[str, Any]:
    """What the engines answered, by case."""
    spec, out, log = (directory / name for name in ("spec.json", "out.json", "log"))
    spec.write_text(json.dumps(cases))
    status = process.run(["-m", "tests.workers.vllm_several", str(spec), str(out)], log, env=env, timeout=timeout)
    assert status == 0, process.tail(log)
    answered = json.loads(out.read_text())
    for of in answered.values():
        of["results"] = [Result.load(directory / file) for file in of.get("results", [])]
    return answered
