"""Results of checks: written down one by one as they come, so that what ran is never lost."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"


class Report:
    """Appends one JSON object a line to ``file``: ``section``, ``check``, ``status``, ``seconds``, and what the check
    returned or why it failed."""

    def __init__(self, section: str, file: Path | None, deadline: float) -> None:
        self.section, self.file, self.deadline = section, file, deadline
        self.failed = False

    def add(self, check: str, status: str, seconds: float = 0.0, **more: Any) -> None:
        self.failed |= status == FAILED
        record = {"section": self.section, "check": check, "status": status, "seconds": round(seconds, 2), **more}
        if self.file:
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")
        print(line(record), flush=True)

    def run(self, check: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run one check unless time is up; an exception is its failure and nobody else's."""
        begin = time.monotonic()
        if time.time() > self.deadline:
            self.add(check, LEFT_OUT, reason="out of time")
            return
        try:
            found = function()
        except Exception as e:
            trace = traceback.format_exc(limit=-4)
            self.add(check, FAILED, time.monotonic() - begin, reason=f"{type(e).__name__}: {e}"[:2000], trace=trace)
        else:
            self.add(check, OK, time.monotonic() - begin, **found)


def line(record: dict[str, Any]) -> str:
    values = " ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record.items()
        if name not in ("section", "check", "status", "seconds", "trace") and not isinstance(value, dict | list)
    )
    return f"{record['status']:8} {record['section']:8} {record['check']:46} {record['seconds']:6.1f} s  {values}"
