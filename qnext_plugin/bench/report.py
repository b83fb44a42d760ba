"""The report of ``qnext bench`` as a table and a chart: rates, ratios pair by pair, and limits."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RATE = "tokens per second"
EXTRA = ("tokens per step", "acceptance", "first token ms", "further token ms")
ABOUT = (
    ("start-up seconds", "s", 1),
    ("first request seconds", "s", 1),
    ("peak resident bytes", "GiB", 2**30),
    ("peak device bytes", "GiB", 2**30),
)


@dataclass
class Report:
    """The results of one benchmark. ``kind`` is ``offline`` or ``served``.

    A list of measurements has an entry for each pair. The keys of ``about`` are the names in ``ABOUT``, then the sides.
    Each of the ``workloads`` has the rates of each side and, for two sides, their ``ratio``; then, by side, the
    ``limit`` and other figures (see ``EXTRA``).
    """

    kind: str
    command: str
    model: str
    machine: str
    date: str
    sides: list[str]
    engines: dict[str, str]
    modules: dict[str, list[str]]
    ranks: int | None
    dtype: str
    mtp: int
    ceilings: dict[str, float]
    about: dict[str, dict[str, list[float]]]
    workloads: dict[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file that ``--json`` writes."""
        found = asdict(self)
        about, workloads = found.pop("about"), found.pop("workloads")
        return found | about | {"workloads": workloads}


def summary(pairs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Summarize by workload what each side measured, pair by pair.

    A workload has the rates of each side, the ``ratio`` of the first side's rates to the second's (the median over
    pairs), and all other figures that both sides have, as lists by side.
    """
    names = list(pairs[0])
    table: dict[str, dict[str, Any]] = {}
    for workload, found in pairs[0][names[0]]["workloads"].items():
        runs = {name: [pair[name]["workloads"][workload] for pair in pairs] for name in names}
        table[workload] = {name: [run[RATE] for run in runs[name]] for name in names}
        if len(names) == 2:
            table[workload]["ratio"] = statistics.median(ratios(table[workload], names))
        more = [key for key in found if key != RATE and all(key in run for each in runs.values() for run in each)]
        table[workload] |= {key: {name: [run[key] for run in runs[name]] for name in names} for key in more}
    return table


def ratios(row: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[float]:
    first, second = (row[name] for name in names)
    return [a / b for a, b in zip(first, second, strict=True)]


def spread(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the median and range of the ratios as text."""
    found = ratios(row, names)
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def text(report: Report) -> str:
    """Return the text that ``qnext bench`` prints."""
    names, workloads = report.sides, report.workloads
    extra = [key for key in EXTRA if any(key in row for row in workloads.values())]
    rows = [
        [
            *("workload", *(f"{name} tok/s" for name in names), *(["ratio (range)"] if len(names) == 2 else [])),
            *("limit tok/s", *(f"{name} of it" for name in names)),
            *(f"{key}, {name}" for key in extra for name in names),
        ]
    ]
    for workload, row in workloads.items():
        medians = [statistics.median(row[name]) for name in names]
        limits = [row["limit"][name] if "limit" in row else None for name in names]
        rows.append(
            [
                *(
                    workload,
                    *(f"{median:.1f}" for median in medians),
                    *([spread(row, names)] if len(names) == 2 else []),
                ),
                " / ".join(dict.fromkeys(f"{limit:.0f}" for limit in limits if limit)),
                *(f"{median / limit:.0%}" if limit else "" for median, limit in zip(medians, limits, strict=True)),
                *(f"{statistics.median(row[key][n]):.2f}" if key in row else "" for key in extra for n in names),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *_notes(report)])


def _notes(report: Report) -> list[str]:
    lines = []
    for key, unit, size in ABOUT:
        if key in report.about:
            found = report.about[key].items()
            values = (f"{name} {statistics.median(each) / size:.2f} {unit}" for name, each in found)
            lines.append(f"{key.rpartition(' ')[0]}: {', '.join(values)}")
    reached = report.ceilings
    lines.append(
        f"reached here: {reached['read'] / 1e9:.1f} GB/s read, {reached['copy'] / 1e9:.1f} GB/s copied, "
        f"{reached['gemm'] / 1e9:.0f} GFLOP/s in {report.dtype}"
    )
    loops = {w: max(map(max, row["looping"].values())) for w, row in report.workloads.items() if "looping" in row}
    if report.mtp and any(loops.values()):
        said = ", ".join(f"{number} of {workload}" for workload, number in loops.items())
        lines.append(f"outputs that end in a loop, in which every draft is right: {said}")
    return lines


def check_plot(file: Path) -> None:
    """Raise ``ValueError`` if a chart cannot be drawn; to be called before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {file}: expected a name that ends in .png, .svg or .pdf")


def plot(report: Report, file: Path) -> None:
    """Draw bars of each workload's median rates, with whiskers from minimum to maximum, and the limit as a line."""
    from matplotlib.figure import Figure

    names, workloads = report.sides, report.workloads
    figure = Figure(figsize=(max(6.0, 1.9 * len(workloads)), 4.5), layout="constrained")
    for i, (workload, row) in enumerate(workloads.items()):
        axes = figure.add_subplot(1, len(workloads), i + 1)
        for x, name in enumerate(names):
            median = statistics.median(row[name])
            whiskers = [[median - min(row[name])], [max(row[name]) - median]]
            axes.bar(x, median, yerr=whiskers, capsize=4, color=f"C{x}", label=name)
            axes.annotate(f"{median:.0f}", (x, 0), (0, 3), textcoords="offset points", ha="center", color="white")
            if "limit" in row:
                axes.hlines(row["limit"][name], x - 0.45, x + 0.45, colors="black", linestyles="dashed")
        axes.set_title(workload + (f"\n{spread(row, names)}" if len(names) == 2 else ""), fontsize=9)
        axes.set_xticks(range(len(names)), names)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens per second")
    what = f"{names[0]} / {names[1]}: median ratio (range); " if len(names) == 2 else ""
    figure.suptitle(
        f"{report.model} on {report.engines[names[0]]}, {report.machine}\n{what}dashed: the machine's limit",
        fontsize=10,
    )
    figure.savefig(file, dpi=150)


def add_acceptance(workloads: Mapping[str, dict[str, Any]], draft_tokens: int) -> None:
    """Add the share of accepted drafts, computed from the tokens per step, of which one is not a draft."""
    for row in workloads.values():
        if draft_tokens and "tokens per step" in row:
            steps = row["tokens per step"].items()
            row["acceptance"] = {name: [(one - 1) / draft_tokens for one in each] for name, each in steps}
