"""Run child processes so that none outlives its use, and so that the log explains a failure."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType


class EngineFailed(RuntimeError):
    """Raised if a process did not start, died or hung, or if another model serves.

    The text is ``reason`` and the end of the log.
    """

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"{reason}\n{tail(log)}")
        self.reason, self.log = reason, log


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def failure(log: Path, status: int) -> str:
    """Return the last exception in a log; without one, the exit status and the last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [match[0] for line in lines if (match := re.search(r"\b\w+(Error|Exception)\b: .*", line))]
    return errors[-1] if errors else f"status {status}: {lines[-1] if lines else 'no output'}"


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] = MappingProxyType({}), python: str = sys.executable
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python *command`` in its own process group, with its output in ``log``.

    Its standard input stays open until the context ends, which also ends the whole group.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(env),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        assert process.stdin
        try:
            with suppress(BrokenPipeError):
                process.stdin.close()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
        finally:  # even if this process is interrupted again
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] = MappingProxyType({}),
    timeout: float = 240,
    python: str = sys.executable,
) -> int:
    """Run ``python *command`` and return its exit status; raises ``EngineFailed`` after ``timeout`` seconds."""
    with started(command, log, env, python) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EngineFailed(f"{' '.join(command)}: still running after {timeout} s", log) from None


def peak_resident_bytes(group: int) -> int:
    """Return the sum of the peak memory of the living processes of a group; shared memory counts for each of them."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                status = (process / "status").read_text()
                total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    return total


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Path,
    timeout: float,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Poll until ``condition()`` holds; raises ``EngineFailed`` if the process ends first, and after ``timeout``.

    ``timeout`` is in seconds. After each poll ``waiting`` is called with the number of seconds that have passed.
    """
    begin = time.monotonic()
    while True:
        ended = process.poll() is not None  # read before the condition, so that what it did before its end counts
        if condition():
            return
        seconds = time.monotonic() - begin
        if ended:
            raise EngineFailed(failure(log, process.returncode), log)
        if seconds > timeout:
            raise EngineFailed(f"still running after {timeout:.0f} s", log)
        waiting(seconds)
        time.sleep(0.1)
