"""One server at a time, shared by the tests of this folder, which ask for it by name."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.installed import ENGINE
from tests.support.serving import SERVERS, Server, serving


@pytest.fixture(scope="package")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> Iterator[Server]:
    """The server of that name in ``SERVERS``: ``parametrize("server", [name], indirect=True)``."""
    settings, log = SERVERS[request.param], tmp_path_factory.mktemp(request.param) / "log"
    with serving(ENGINE, checkpoint(settings.checkpoint), settings.flags[ENGINE], log, settings.env) as server:
        yield server
