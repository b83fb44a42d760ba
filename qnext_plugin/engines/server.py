"""Start and stop an engine's own HTTP server."""

import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qnext_plugin.engines import process

COMMANDS = {
    "vllm": ("-m", "vllm.entrypoints.cli.main", "serve"),
    "sglang": ("-m", "sglang.launch_server", "--model-path"),
}
"""These are the arguments of ``python`` before the model."""


@dataclass(frozen=True)
class Server:
    """A server that answers requests. Its process id is also the id of the group of all processes that it started."""

    engine: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]


def command(engine: str, model: str, port: int, flags: Sequence[str]) -> list[str]:
    """Return the arguments of ``python`` that serve a model, reachable from this machine only."""
    return [*COMMANDS[engine], model, "--host", "127.0.0.1", "--port", str(port), *flags]


@contextmanager
def serving(
    engine: str,
    model: str,
    flags: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] = MappingProxyType({}),
    python: str = sys.executable,
    port: int = 0,
    timeout: float = 400,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Serve a model on ``port``, by default a free one; on exit, end the server with every process that it started.

    Raises ``EngineFailed`` if the server ends before it answers, and after ``timeout`` seconds. Several times a second
    ``waiting`` is called with the number of seconds that have passed. Raises ``ValueError`` if another server already
    answers on the port.
    """
    port = port or process.free_port()
    url = f"http://127.0.0.1:{port}"
    if is_healthy(url):
        raise ValueError(f"another server answers on port {port}; choose another port")
    with process.started(command(engine, model, port, flags), log, env, python) as child:
        process.wait_until(lambda: is_healthy(url), child, log, timeout, waiting)
        yield Server(engine, url, log, child)


def is_healthy(url: str) -> bool:
    """Return whether a server answers requests."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
