"""Functions of ``tests.workers``, which need an engine, called in a process of their own."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qnext_plugin.engines import remote


def call(
    name: str,
    directory: Path,
    /,
    *,
    timeout: float = 900,
    env: Mapping[str, str] = MappingProxyType({}),
    **arguments: Any,
) -> Any:
    """What ``tests.workers.NAME``, a ``module:function``, returns; its log is in the new ``directory``."""
    with remote.started(directory, env) as worker:
        return worker.call(f"tests.workers.{name}", timeout, **arguments)
