"""Results of checks: written down one by one as they come, so that what ran is never lost."""

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, FAILED, LEFT_OUT, RUNNING = "ok", "FAILED", "left out", "running"
RESTART = 75  # exit status of a worker whose device is beyond use: start it again for the checks that are left


class Report:
    """Appends one JSON object a line to ``file``: ``section``, ``check``, ``status``, ``seconds``, and what the check
    returned or why it failed. A check that ``file`` has already is not run again; one that was running when its process
    died has failed."""

    def __init__(self, section: str, file: Path | None, deadline: float) -> None:
        self.section, self.file, self.deadline = section, file, deadline
        self.known = read(file) if file and file.exists() else {}
        self.failed = False
        for (_, check), record in list(self.known.items()):
            if record["status"] == RUNNING:
                self.add(check, FAILED, reason="its process died")

    def add(self, check: str, status: str, seconds: float = 0.0, **more: Any) -> None:
        self.failed |= status == FAILED
        record = {"section": self.section, "check": check, "status": status, "seconds": round(seconds, 2), **more}
        if self.file:
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")
        if status != RUNNING:
            print(line(record), flush=True)

    def run(self, check: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run one check unless time is up; an exception is its failure and nobody else's."""
        if (self.section, check) in self.known:
            return
        if time.time() > self.deadline:
            self.add(check, LEFT_OUT, reason="out of time")
            return
        self.add(check, RUNNING)
        begin = time.monotonic()
        try:
            found = function()
        except Exception as e:
            trace = traceback.format_exc(limit=-4)
            self.add(check, FAILED, time.monotonic() - begin, reason=f"{type(e).__name__}: {e}"[:2000], trace=trace)
            if type(e).__name__ == "AcceleratorError" or "CUDA error" in str(e):
                os._exit(RESTART)
        else:
            self.add(check, OK, time.monotonic() - begin, **found)


def read(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of every check in a file that may still be written to."""
    records = {}
    for text in file.read_text().splitlines():
        if text.endswith("}"):
            record = json.loads(text)
            records[record["section"], record["check"]] = record
    return records


def line(record: dict[str, Any]) -> str:
    values = " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record.items()
        if name not in ("section", "check", "status", "seconds", "trace") and not isinstance(value, dict | list)
    )
    return f"{record['status']:8} {record['section']:8} {record['check']:48} {record['seconds']:6.1f} s  {values[:300]}"
