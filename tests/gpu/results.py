"""Hooks of pytest that write each result down as it comes and end a test that hangs, so that no other is lost."""

import faulthandler
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "running"
DEVICE_LOST = 75  # exit status of a process whose GPU answers nothing any more


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--results", type=Path, metavar="FILE", help="write each result there as it comes, as JSON")
    group.addoption("--deadline", type=float, metavar="UNIX-TIME", help="skip tests after it")
    group.addoption("--directory", type=Path, metavar="DIR", help="where checkpoints and logs go")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--results", None):
        config.pluginmanager.register(Results(file, deadline(config)))


def deadline(config: pytest.Config) -> float:
    return config.getoption("--deadline", None) or float("inf")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a process that hangs, as one whose GPU does would, after the seconds of ``timeout`` or past the deadline."""
    marker = item.get_closest_marker("timeout")
    seconds = min(marker.args[0] if marker else 3600, deadline(item.config) + 5 - time.time())
    stderr = item.config.stash[fault_handler_stderr_fd_key]  # the process's own, which pytest does not capture
    faulthandler.dump_traceback_later(max(seconds, 1), exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


class Results:
    """Appends one JSON object a line to ``file``; a test that ``file`` has already does not run again.

    Each has the ``kind`` of result (the name of the test's module), ``test``, ``outcome``, ``seconds``, ``reason``
    where it did not pass, and what the test gave to ``record_property``. Tests after ``deadline`` (Unix time) are
    skipped.
    """

    def __init__(self, file: Path, deadline: float) -> None:
        self.file, self.deadline = file, deadline
        self.known = read(file)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [item for item in items if item.nodeid in self.known]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        add(self.file, nodeid, RUNNING)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.time() > self.deadline:
            pytest.skip("out of time")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        reason = {}
        if report.skipped:
            reason["reason"] = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            reason["reason"] = report.longreprtext[-3000:]
        add(self.file, report.nodeid, report.outcome, report.duration, **reason, **dict(report.user_properties))
        if report.failed and ("CUDA error" in report.longreprtext or "AcceleratorError" in report.longreprtext):
            os._exit(DEVICE_LOST)


def add(file: Path, test: str, outcome: str, seconds: float = 0.0, **more: Any) -> None:
    kind = Path(test.partition("::")[0]).stem.removeprefix("test_")
    result = {"kind": kind, "test": test, "outcome": outcome, "seconds": round(seconds, 2)} | more
    with file.open("a") as out:
        out.write(json.dumps(result) + "\n")


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of every test in a file that may still be written to, or not be there yet."""
    lines = file.read_text().splitlines() if file.exists() else []
    results = (json.loads(line) for line in lines if line.endswith("}"))
    return {result["test"]: result for result in results}


def unfinished(file: Path) -> Iterator[str]:
    """The tests that were running when the process that wrote ``file`` ended."""
    return (test for test, result in read(file).items() if result["outcome"] == RUNNING)


def line(result: dict[str, Any]) -> str:
    """One line for people: what was tested, how it went, and each number that was recorded."""
    values = " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
        if name not in ("kind", "test", "outcome", "seconds", "reason") and not isinstance(value, dict | list)
    )
    reason = result.get("reason", "").strip().rpartition("\n")[2]
    name = result["test"].partition("::")[2] or result["test"]
    return f"{result['outcome']:7} {result['kind']:8} {name:80} {result['seconds']:6.1f} s  {values}{reason}"[:400]
