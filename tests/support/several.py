"""The test's side of ``vllm_several``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Result
from qnext_plugin.verify.scenarios import Scenario
from tests.support.workers import call


def case(model: Path, config: EngineConfig, scenarios: tuple[Scenario, ...], **args: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "config": asdict(config),
        "args": args,
        "scenarios": [asdict(scenario) for scenario in scenarios],
    }


def serve(
    directory: Path, cases: dict[str, Any], env: Mapping[str, str] = MappingProxyType({}), timeout: float = 900
) -> dict[str, Any]:
    """What the engines answered, by case."""
    answered: dict[str, Any] = call(
        "vllm_several:serve", directory / "worker", timeout=timeout, env=env, cases=cases, directory=str(directory)
    )
    for of in answered.values():
        of["results"] = [Result.load(directory / file) for file in of.get("results", [])]
    return answered
