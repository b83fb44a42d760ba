"""One server at a time, shared by the tests of this folder, which ask for it by name."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.installed import ENGINE
from tests.support.serving import SERVERS, Server, serving
from tests.support.warm import Warm


@pytest.fixture(scope="package")
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[[str], Path],
    libraries: Warm,
) -> Iterator[Server]:
    """The server of that name in ``SERVERS``: ``parametrize("server", [name], indirect=True)``."""
    settings, log = SERVERS[request.param], tmp_path_factory.mktemp(request.param) / "log"
    forking = nullcontext() if request.param == "demo" else libraries.forking()
    served = serving(ENGINE, checkpoint(settings.checkpoint), settings.flags[ENGINE], log, settings.env)
    with forking, served as server:
        yield server
