"""A process that holds an engine or starts several: ``python -m qnext_plugin.engines.worker DIRECTORY``.

``qnext_plugin.engines.remote`` is the other end. Line i of the input is a JSON object. The process calls ``call``, a
``module:name``, with ``arguments``, and writes the ``result`` and the time when it was ``finished`` to
``DIRECTORY/i.json``. With ``hold`` the result stays here instead, as the first argument of later calls. An exception
in a call ends the process.
"""

import json
import os
import pkgutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def follow(directory: Path) -> None:
    """Make the calls that the input requests, until the input ends."""
    held: tuple[Any, ...] = ()
    for i, line in enumerate(sys.stdin):
        request = json.loads(line)
        result = pkgutil.resolve_name(request["call"])(*held, **request["arguments"])
        if request["hold"]:
            held, result = (result,), None
        part = directory / "part"
        part.write_text(json.dumps({"result": result, "finished": time.time()}))
        part.rename(directory / f"{i}.json")


def main(directory: str) -> None:
    status = 0
    try:
        follow(Path(directory))
    except SystemExit as e:  # the engine has already printed the reason
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # shutting an engine down may never finish; the caller ends the whole process group


if __name__ == "__main__":
    main(sys.argv[1])
