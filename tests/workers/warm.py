"""Import modules once, then fork a process for each command: ``python -m tests.workers.warm MODULE ...``.

A line of JSON on the standard input asks for ``{"command", "directory", "env", "input", "log"}``, to be run as by
``python *command`` in that directory and a process group of its own, with the pipe ``input`` as its standard input and
``log`` as its output; it is answered with the ``pid``. Or the line asks for the ``returncode`` of a ``pid``, which is
null while that runs.
"""

import gc
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from importlib import import_module
from typing import Any


def fork(command: list[str], directory: str, env: dict[str, str], input: str, log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(input, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(env)
        os.chdir(directory)
        sys.path[:0] = [directory, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        # Engines ask for "spawn", whose processes would import them again.
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda *args, **kwargs: None
        forked = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: forked
        run(*command)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        os._exit(status)


def run(option: str, program: str, *argv: str) -> None:
    """Run a program as ``python`` does, whose ``option`` is ``-m`` or ``-c``."""
    sys.argv = [program if option == "-m" else option, *argv]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


def returncode(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main(*modules: str) -> None:
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # some modules print while they are imported
    for module in modules:
        import_module(module)
    gc.freeze()
    for line in asked:
        request: dict[str, Any] = json.loads(line)
        answer = {"pid": fork(**request)} if "command" in request else {"returncode": returncode(request["pid"])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
