"""Child processes that end when they should, and leave a readable trace when they do not."""

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
    """A process did not start, died or hung, or another model serves. The text is ``reason``, then the log's end."""

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"{reason}\n{tail(log)}")
        self.reason, self.log = reason, log


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def failure(log: Path, status: int) -> str:
    """The last exception in a log, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [match[0] for line in lines if (match := re.search(r"\b\w+(Error|Exception)\b: .*", line))]
    return errors[-1] if errors else f"status {status}: {lines[-1] if lines else 'no output'}"


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] = MappingProxyType({}), python: str = sys.executable
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python *command`` in its own process group, output to ``log``; the whole group is gone on leaving.

    Its standard input stays open until then.
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
        finally:  # also where this process is interrupted once more meanwhile
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
    """Exit status of ``python *command``; raises ``EngineFailed`` after a timeout."""
    with started(command, log, env, python) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EngineFailed(f"{' '.join(command)}: still running after {timeout} s", log) from None


def peak_resident_bytes(group: int) -> int:
    """The most that each living process of a process group held in memory, summed; what they share counts for each."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
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
    """Poll until ``condition()`` holds; raises ``EngineFailed`` where the process ends first, and after a timeout.

    ``waiting`` is told after each poll how many seconds have passed.
    """
    begin = time.monotonic()
    while True:
        ended = process.poll() is not None  # looked at first: what it did before it ended counts
        if condition():
            return
        seconds = time.monotonic() - begin
        if ended:
            raise EngineFailed(failure(log, process.returncode), log)
        if seconds > timeout:
            raise EngineFailed(f"still running after {timeout:.0f} s", log)
        waiting(seconds)
        time.sleep(0.1)
