"""Processes that are forked from one that has imported the engine, or its libraries: most of what a start takes.

They are as new as others, but for what import leaves behind, and so are the processes that they start. What a start of
its own means is left to some of each kind: the server ``demo``, those of ``test_lora`` and ``test_vllm_server`` with
their ranks, and a command of ``test_doctor`` are started as users start them.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from unittest.mock import patch

from qnext_plugin.engines import process

# What a start imports of the engine; nothing of ours, which the engine has to find itself.
MODULES = {
    "vllm": ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    "sglang": ("sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler"),
}

# What the engine reads from the environment while it is imported, and a start of ours would set too late.
ENVIRONMENT = {"vllm": {}, "sglang": {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}}

# What takes longest of the packages that the engine imports.
LIBRARIES = {
    "vllm": (
        *("torch._inductor.compile_fx", "transformers.modeling_gguf_pytorch_utils", "transformers.models.auto"),
        *("openai.types.responses", "fastapi", "aiohttp.web", "xgrammar"),
    ),
    "sglang": (
        *("torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo", "transformers.activations"),
        *("transformers.modeling_gguf_pytorch_utils", "transformers.modeling_layers", "flashinfer", "gguf"),
        *("compressed_tensors.config", "openai.types.responses", "fastapi", "aiohttp.web", "xgrammar"),
    ),
}
ROOT = Path(__file__).parents[2]


class Forked:
    """As much of a ``Popen`` as ``process`` uses."""

    returncode: int | None = None

    def __init__(self, parent: "Warm", pid: int, stdin: IO[bytes]) -> None:
        self.parent, self.pid, self.stdin = parent, pid, stdin

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.parent.ask(pid=self.pid)["returncode"]
        return self.returncode

    def wait(self, timeout: float = 20) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.05)
        return status


class Warm:
    """The process that has imported ``modules`` in an ``environment``; it is started when it is first used."""

    def __init__(self, modules: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.modules, self.log, self.environment = modules, log, environment
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def ask(self, **request: Any) -> dict[str, Any]:
        with self.lock:
            return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "tests.workers.warm", *self.modules]
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | self.environment,
                    cwd=ROOT,
                )
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, process.tail(self.log)
        return dict(json.loads(answer))

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()

    @contextmanager
    def started(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] = MappingProxyType({}),
        python: str = sys.executable,
    ) -> Iterator[Forked]:
        """As ``process.started``."""
        assert python == sys.executable
        pipe = log.with_name(f"{log.name}.input")
        os.mkfifo(pipe)
        here, env = os.getcwd(), os.environ | dict(env)
        pid = self.ask(command=list(command), directory=here, env=env, input=str(pipe), log=str(log))["pid"]
        child = Forked(self, pid, pipe.open("wb"))
        try:
            yield child
        finally:
            with suppress(BrokenPipeError):
                child.stdin.close()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    @contextmanager
    def forking(self) -> Iterator[None]:
        """What is started meanwhile is forked."""
        with patch.object(process, "started", self.started):
            yield
