"""Start an engine in a process of its own, let its worker run scenarios, read what it answered."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines import process
from qnext_plugin.verify.comparison import Result
from qnext_plugin.verify.scenarios import EngineConfig, Scenario

NATIVE_MODULES = {"vllm": "vllm.", "sglang": "sglang."}


class EngineFailed(RuntimeError):
    """An engine did not start, died or hung. ``reason`` is one line, the text ends with the log's last lines."""

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"{reason}\n{process.tail(log)}")
        self.reason = reason


@dataclass(frozen=True)
class Run:
    """One scenario in one start; ``warm`` if it finds the cache as it left it before."""

    key: str
    scenario: Scenario
    mutant: str = ""
    reset: bool = True
    warm: bool = False


def passes(config: EngineConfig, scenarios: Mapping[str, Scenario]) -> list[Run]:
    """Each scenario on an empty cache; where the start is warm, on one that fills up, then all of them again."""
    if not config.warm:
        return [Run(name, scenario) for name, scenario in scenarios.items()]
    first = [Run(name, scenario, reset=False) for name, scenario in scenarios.items()]
    return first + [Run(f"{name} again", s, reset=False, warm=True) for name, s in scenarios.items()]


class Start:
    """One engine start. ``modules`` that serve, ``kernels`` of ours that ran and ``memory`` after ``run``."""

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

    def run(
        self,
        timeout: float,
        progress: Callable[[str], None] = lambda line: None,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Run everything, or raise ``EngineFailed``; what was answered until then can still be read."""
        self.directory.mkdir(parents=True)
        spec = self.directory / "spec.json"
        runs = [{"scenario": asdict(run.scenario), "mutant": run.mutant, "reset": run.reset} for run in self.runs]
        expected = NATIVE_MODULES[self.engine] if self.native else f"{self.engine}_ext."
        spec.write_text(
            json.dumps(
                {"model": str(self.checkpoint), "config": asdict(self.config), "runs": runs, "expect_module": expected}
            )
        )
        env = dict(env) | ({"QNEXT_DISABLE": "1"} if self.native else {})
        command = ["-m", f"{self.engine}_ext.tools.verify", str(spec), str(self.directory)]
        with process.started(command, self.log, env) as child:
            self._follow(child, timeout, progress)
        if child.returncode:
            raise EngineFailed(failure(self.log, child.returncode), self.log)

    def _follow(self, child: subprocess.Popen[bytes], timeout: float, progress: Callable[[str], None]) -> None:
        steps = ["serving.json", *(f"{i}.safetensors" for i in range(len(self.runs)))]
        keys, begin = ["start", *(run.key for run in self.runs)], time.monotonic()
        deadline = begin + timeout
        while child.poll() is None or (steps and (self.directory / steps[0]).exists()):
            if steps and (self.directory / steps[0]).exists():
                key = keys[-len(steps)]
                self.seconds[key] = time.monotonic() - begin
                progress(
                    f"{self.directory.name} {key}: {self.seconds[key]:.1f} s"
                    + (f", {self.modules}" if key == "start" else "")
                )
                steps, begin = steps[1:], time.monotonic()
            elif time.monotonic() > deadline:
                raise EngineFailed(f"still running after {timeout:.0f} s", self.log)
            else:
                time.sleep(0.1)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def modules(self) -> list[str]:
        return list(self._serving()["modules"])

    @property
    def kernels(self) -> list[str]:
        return list(self._serving()["kernels"])

    @property
    def memory(self) -> dict[str, Any]:
        return dict(self._serving()["memory"])

    @property
    def compiled(self) -> int:
        """How many functions torch compiled meanwhile; of SGLang."""
        return int(self._serving()["compiled"])

    def _serving(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "serving.json").read_text()))

    def __contains__(self, key: str) -> bool:
        return self._file(key).exists()

    def __getitem__(self, key: str) -> Result:
        return Result.load(self._file(key))

    def _file(self, key: str) -> Path:
        return self.directory / f"{[run.key for run in self.runs].index(key)}.safetensors"


def failure(log: Path, status: int) -> str:
    """The last exception in a log, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [match[0] for line in lines if (match := re.search(r"\b\w+(Error|Exception)\b: .*", line))]
    return errors[-1] if errors else f"status {status}: {lines[-1] if lines else 'no output'}"
