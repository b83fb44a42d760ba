"""Start an engine in a separate process, let it answer scenarios, and read its answers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.verify.comparison import Result
from qnext_plugin.verify.scenarios import Scenario


@dataclass(frozen=True)
class Run:
    """One scenario in one start. It is ``warm`` if an earlier run of the scenario has filled the cache."""

    key: str
    scenario: Scenario
    mutant: str = ""
    reset: bool = True
    warm: bool = False


def passes(config: EngineConfig, scenarios: Mapping[str, Scenario]) -> list[Run]:
    """Return the runs of a start: each scenario on an empty cache.

    In a warm start the cache is never emptied, and after all scenarios each of them runs again.
    """
    if not config.warm:
        return [Run(name, scenario) for name, scenario in scenarios.items()]
    first = [Run(name, scenario, reset=False) for name, scenario in scenarios.items()]
    return first + [Run(f"{name} again", s, reset=False, warm=True) for name, s in scenarios.items()]


class Start:
    """One start of an engine.

    After ``run``, ``serving`` has the serving ``modules``, our ``kernels`` that ran, sizes in ``memory`` and, for
    SGLang, how many functions torch ``compiled``.
    """

    def __init__(
        self,
        engine: str,
        checkpoint: Path,
        config: EngineConfig,
        runs: list[Run],
        directory: Path,
        native: bool = False,
    ) -> None:
        self.engine, self.checkpoint, self.config, self.runs, self.native = engine, checkpoint, config, runs, native
        self.directory, self.log = directory, directory / "log"
        self.seconds: dict[str, float] = {}
        self.serving: dict[str, Any] = {}

    def run(
        self,
        timeout: float,
        progress: Callable[[str], None] = lambda line: None,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start the engine and make all runs. After an ``EngineFailed``, the earlier answers can still be read.

        ``timeout`` is in seconds, for the start and for each run.
        """
        begin = time.monotonic()

        def note(key: str, more: str = "") -> None:
            nonlocal begin
            self.seconds[key], begin = time.monotonic() - begin, time.monotonic()
            progress(f"{self.name} {key}: {self.seconds[key]:.1f} s{more}")

        started = started_engine(
            self.engine, str(self.checkpoint), self.config, self.directory, native=self.native, env=env
        )
        with started as engine:
            engine.ready(timeout)
            self.serving = engine.serving(timeout)
            note("start", f", {self.serving['modules']}")
            for run in self.runs:
                engine.call(
                    "qnext_plugin.verify.worker:run",
                    timeout,
                    scenario=asdict(run.scenario),
                    mutant=run.mutant,
                    reset=run.reset,
                    file=str(self.file(run.key)),
                )
                note(run.key)
            self.serving = engine.serving(timeout)

    @property
    def name(self) -> str:
        return self.directory.name

    def __contains__(self, key: str) -> bool:
        return self.file(key).exists()

    def __getitem__(self, key: str) -> Result:
        return Result.load(self.file(key))

    def file(self, key: str) -> Path:
        """Return where the answers of a run are."""
        return self.directory / f"{[run.key for run in self.runs].index(key)}.safetensors"
