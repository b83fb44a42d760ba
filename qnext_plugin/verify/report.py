"""The report that `qnext verify` prints and writes, with a row for every scenario of every start."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from qnext_plugin.verify.comparison import Difference

OK = "ok"
NOT_EXERCISED = "not exercised"
COLUMNS = ("start", "scenario", "positions", "max", "mean", "KL", "top-1", "worst position", "verdict")


@dataclass(frozen=True)
class Row:
    """The verdict on one scenario of one start.

    ``max_bound``, ``usual_bound`` and, in a lower precision, ``sustained_bound`` limit these errors of ``difference``.
    ``loops`` counts outputs that end in a loop.
    """

    start: str
    scenario: str
    verdict: str
    difference: Difference | None = None
    max_bound: float | None = None
    usual_bound: float | None = None
    sustained_bound: float | None = None
    loops: int = 0

    def cells(self) -> list[str]:
        d = self.difference
        if d is None:
            return [self.start, self.scenario, *("" for _ in COLUMNS[3:]), self.verdict]
        positions = f"{d.positions}" + (f" +{d.ties}" if d.ties else "")
        numbers = [f"{value:.1e}" for value in (d.max, d.mean, max(0.0, d.kl))]
        return [self.start, self.scenario, positions, *numbers, f"{d.agreement:.1%}", d.worst, self.verdict]

    def as_json(self) -> dict[str, object]:
        found = asdict(self)
        if self.difference is not None:
            del found["difference"]["means"], found["difference"]["maxima"]
            found["difference"] |= {"mean": self.difference.mean, "usual": self.difference.usual}
        return found


class HasCells(Protocol):
    def cells(self) -> list[str]: ...


def table(rows: Sequence[HasCells], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as a Markdown table, which is readable without rendering."""
    cells = [list(columns), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def notes(rows: Sequence[Row]) -> list[str]:
    """Return lines that explain the table."""
    found = []
    compared = [row for row in rows if row.difference is not None]
    if ties := sum(row.difference.ties for row in compared if row.difference):
        found.append(
            f"+N: {ties} positions are off and not counted, because before them two experts tied within rounding, "
            "where right implementations differ"
        )
    if loops := sum(row.loops for row in rows):
        found.append(f"{loops} outputs end in a loop; where the verdict is ok the reference chooses the same tokens")
    bad = sum(row.verdict != OK for row in rows)
    found.append(f"{len(rows) - bad} of {len(rows)} ok")
    return found
