"""Child processes that end when they should, and leave a readable trace when they do not."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


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
        with suppress(BrokenPipeError):
            process.stdin.close()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
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
    """Exit status of ``python *command``; a timeout is an assertion error with the log's tail."""
    with started(command, log, env, python) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{' '.join(command)}: still running after {timeout} s\n{tail(log)}") from None


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
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout: float = 180
) -> None:
    """Poll until ``condition()`` holds; a dead process or a timeout is an assertion error with the log's tail."""
    deadline = time.monotonic() + timeout
    while not condition():
        status = process.poll()
        assert status is None, f"process ended with status {process.returncode}\n{tail(log)}"
        assert time.monotonic() < deadline, f"not ready after {timeout} s\n{tail(log)}"
        time.sleep(0.3)
