"""A process that calls our functions in an engine's environment, and that may hold an engine."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines import process
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.who_serves import check_modules, native_environment


class Remote:
    """The caller's end of ``qnext_plugin.engines.worker``.

    ``log`` is the file with the worker's output, ``pid`` its process group.
    """

    def __init__(self, child: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
        self._child, self._directory, self._sent = child, directory, 0
        self.log, self.pid = log, child.pid

    def send(self, name: str, /, hold: bool = False, **arguments: Any) -> int:
        """Request a call of ``name``, a ``module:name``, without waiting; returns the number to ``receive``.

        With ``hold`` the result stays in the process and becomes the first argument of every later call.
        """
        assert self._child.stdin
        request = {"call": name, "arguments": arguments, "hold": hold}
        with suppress(BrokenPipeError):  # the process has ended; `receive` raises then
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        self._sent += 1
        return self._sent - 1

    def receive(self, number: int, timeout: float) -> tuple[Any, float]:
        """Return the result of a call and the time when it finished.

        Raises ``EngineFailed`` if the process ends first, and after ``timeout`` seconds.
        """
        file = self._directory / f"{number}.json"
        process.wait_until(file.exists, self._child, self.log, timeout)
        answer = json.loads(file.read_text())
        return answer["result"], answer["finished"]

    def call(self, name: str, timeout: float, /, **arguments: Any) -> Any:
        """Call ``name`` and return its result; see ``send`` and ``receive``."""
        return self.receive(self.send(name, **arguments), timeout)[0]


class RemoteEngine(Remote):
    """A ``Remote`` that holds an engine, which is the first argument of every call."""

    def __init__(self, child: subprocess.Popen[bytes], directory: Path, log: Path, engine: str, native: bool) -> None:
        super().__init__(child, directory, log)
        self.engine, self.native, self._begun = engine, native, time.time()

    def start(self, model: str, config: EngineConfig, arguments: Mapping[str, Any]) -> None:
        self._start = self.send(
            f"{self.engine}_ext.tools.engine:start",
            hold=True,
            model=model,
            config=asdict(config),
            arguments=dict(arguments),
        )

    def ready(self, timeout: float) -> float:
        """Wait until the engine has started, and return how many seconds that took."""
        return self.receive(self._start, timeout)[1] - self._begun

    def serving(self, timeout: float) -> dict[str, Any]:
        """Return what the adapter's ``Engine.serving`` returns, after checking its ``modules``."""
        found: dict[str, Any] = self.call(f"{self.engine}_ext.tools.engine:Engine.serving", timeout)
        check_modules(found["modules"], self.engine, self.native, self.log)
        return found


@contextmanager
def started(
    directory: Path, env: Mapping[str, str] = MappingProxyType({}), python: str = sys.executable
) -> Iterator[Remote]:
    """Start a process without an engine; its log and answers are files in the new ``directory``."""
    with _child(directory, env, python) as child:
        yield Remote(child, directory, directory / "log")


@contextmanager
def started_engine(
    engine: str,
    model: str,
    config: EngineConfig,
    directory: Path,
    *,
    native: bool = False,
    env: Mapping[str, str] = MappingProxyType({}),
    python: str = sys.executable,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[RemoteEngine]:
    """Start a process as ``started`` does, and an engine in it; wait for the engine with ``ready``.

    If ``native``, the engine serves its own model instead of ours. ``arguments`` are further arguments of ``vllm.LLM``
    or ``sglang.Engine``.
    """
    with _child(directory, dict(env) | native_environment(native), python) as child:
        remote = RemoteEngine(child, directory, directory / "log", engine, native)
        remote.start(model, config, arguments)
        yield remote


@contextmanager
def _child(directory: Path, env: Mapping[str, str], python: str) -> Iterator[subprocess.Popen[bytes]]:
    directory.mkdir(parents=True)
    command = ["-m", "qnext_plugin.engines.worker", str(directory)]
    with process.started(command, directory / "log", env, python) as child:
        yield child
        assert child.stdin
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            child.stdin.close()  # the worker ends with its input
            child.wait(20)
