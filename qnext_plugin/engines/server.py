"""An engine's own HTTP server."""

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
"""Arguments of ``python``, before the model."""


@dataclass(frozen=True)
class Server:
    """One that answers; the id of its process is that of the group of all that it started."""

    engine: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]


def command(engine: str, model: str, port: int, flags: Sequence[str]) -> list[str]:
    """Arguments of ``python`` that serve a model on this machine alone."""
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
    """Serve a model, on a free port unless told one, and end the server with every process that it started.

    Raises ``EngineFailed`` where the server ends before it answers, and after ``timeout`` seconds; ``waiting`` is told
    how many have passed, several times each second. ``ValueError`` for a port where another server answers.
    """
    port = port or process.free_port()
    url = f"http://127.0.0.1:{port}"
    if is_healthy(url):
        raise ValueError(f"another server answers on port {port}; choose another port")
    with process.started(command(engine, model, port, flags), log, env, python) as child:
        process.wait_until(lambda: is_healthy(url), child, log, timeout, waiting)
        yield Server(engine, url, log, child)


def is_healthy(url: str) -> bool:
    """Whether a server answers requests."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
