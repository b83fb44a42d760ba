"""Draw the figures of the README and of ``docs/``: ``scripts/figures [--check]``.

Charts are drawn from ``bench/results/*.json``, drawings of how it works by ``bench/drawings.py``. ``--check`` changes
nothing and fails if a file differs from what would be drawn.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from bench.drawings import row_order, state_cache
from bench.svg import Drawing

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
GIB = 2**30
CPUS = {"cpu-": ("a", "CPU with AVX512-BF16"), "cpu-avx2-": ("b", "CPU with AVX2 alone")}


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def speed() -> str:
    """How many times as fast as the other side each workload is, on both CPUs."""
    sides = {"eager": "vLLM's own model", "llama-cpp": "llama.cpp"}
    workloads = ("prefill 4x512", "prefill 1x2000", "decode batch 1", "decode batch 4", "decode batch 8")
    left, right, row = 150, 660, 38
    figure = Drawing(760, 545, "Speed against vLLM's own model and llama.cpp on two CPUs")
    figure.text(24, 32, "How many times as fast on two CPU cores (bfloat16)", style="bold")
    figure.legend(24, 56, list(CPUS.values()))

    def at(ratio: float) -> float:
        return left + (right - left) * ratio / 6.3

    top, y, labels = 76.0, 76.0, []
    for side, title in sides.items():
        figure.text(24, y + 14, f"Against {title}", style="bold")
        y += 26
        for workload in workloads:
            figure.text(left - 10, y + 19, workload, "soft", anchor="end")
            for i, (cpu, (color, _)) in enumerate(CPUS.items()):
                found = results(f"{cpu}{side}")["workloads"][workload]
                ratio, rate = found["ratio"], statistics.median(found["ours"])
                figure.box(left, y + 1 + 15 * i, at(ratio) - left, 13, color)
                labels.append((at(ratio) + 6, y + 12 + 15 * i, f"{ratio:.2f}x, {rate:.0f} tokens/s"))
            y += row
        y += 8
    figure.line([(at(1), top), (at(1), y)], "ink", dash="3 3")
    figure.text(at(1), y + 14, "1x: equally fast", "soft", anchor="middle", style="small")
    for x, y, text in labels:
        figure.text(x, y, text, style="small")
    return figure.render()


def memory() -> str:
    """The bytes of the weights in each stored format."""
    kinds = {"experts": ("a", "experts"), "others": ("c", "everything else"), "MTP draft": ("b", "MTP draft")}
    names = {"bfloat16": "bfloat16", "w8a8": "int8 by row", "fp8-block": "FP8 blocks of 128x128"}
    names |= {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "w4a16": "int4, groups of 128"}
    found = results("plan-80b")["weights"]
    left, right, row = 180, 670, 34
    figure = Drawing(760, 86 + row * len(names), "Weights of the 80B by format")
    figure.text(24, 32, "Weights of the 80B with its draft, in GiB", style="bold")
    figure.legend(24, 56, list(kinds.values()), 140)
    for i, (name, title) in enumerate(names.items()):
        sizes = dict(found[name])
        total, y, x = sum(sizes.values()) / GIB, 72 + row * i, float(left)
        parts = {"experts": sizes.pop("experts"), "MTP draft": sizes.pop("MTP draft")}
        parts["others"] = sum(sizes.values())
        figure.text(left - 10, y + 16, title, "soft", anchor="end")
        for kind, (color, _) in kinds.items():
            width = (right - left) * parts[kind] / GIB / 160
            figure.box(x, y, width, 22, color)
            x += width
        figure.text(x + 8, y + 16, f"{total:.1f}")
    return figure.render()


def concurrency() -> str:
    """The sequences at once by their length, on two machines."""
    found = results("plan-80b")["concurrency"]
    figure = Drawing(760, 330, "Sequences at once by their length")
    figure.text(24, 32, "Sequences of the 80B at once, with two drafts and prefix caching (calculated)", style="bold")
    names = {"a": "vLLM", "b": "SGLang"}
    figure.legend(24, 56, list(names.items()), 90)
    for i, (machine, engines) in enumerate(found.items()):
        left, right, top, bottom = 74 + 370 * i, 340 + 370 * i, 104, 280
        figure.text(left, 84, machine, style="bold")
        lines = {color: {int(n): at_once for n, at_once in engines[name].items()} for color, name in names.items()}
        chart(figure, (left, right, top, bottom), lines, ("1", "10", "100", "1000"))
        figure.text((left + right) / 2, bottom + 36, "tokens of each sequence", "soft", anchor="middle", style="small")
    return figure.render()


def context() -> str:
    """The microseconds of a layer's decode step by the length of the context."""
    found = results("cpu-context")["microseconds by context"]
    kinds = {"a": "Gated DeltaNet", "b": "gated attention", "c": "experts"}
    figure = Drawing(760, 300, "Time of a layer's decode step by the length of the context")
    figure.text(24, 32, "A layer's decode step in microseconds of one CPU thread, by context", style="bold")
    figure.legend(24, 56, list(kinds.items()), 150)
    lines = {color: {int(n): statistics.median(found[kind][n]) for n in found[kind]} for color, kind in kinds.items()}
    chart(figure, (84, 670, 80, 250), lines, ("100", "1000", "10000"), last=True, unit=" us")
    figure.text(370, 286, "tokens of context", "soft", anchor="middle", style="small")
    return figure.render()


def chart(
    figure: Drawing,
    frame: tuple[float, float, float, float],
    lines: dict[str, dict[int, float]],
    ticks: tuple[str, ...],
    last: bool = False,
    unit: str = "",
) -> None:
    """Draw lines on logarithmic axes; ``frame`` is left, right, top and bottom, ``lines`` are by color.

    The last point of a line has its value beside it, and without ``last`` each other one above or below it.
    """
    left, right, top, bottom = frame
    lengths = sorted(next(iter(lines.values())))
    span, floor = math.log(lengths[-1] / lengths[0]), math.log10(float(ticks[0]))

    def at(length: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(length / lengths[0]) / span
        share = (math.log10(max(value, float(ticks[0]))) - floor) / (math.log10(float(ticks[-1])) - floor)
        return round(x, 1), round(bottom - (bottom - top) * share, 1)

    for tick in ticks:
        y = at(lengths[0], float(tick))[1]
        figure.line([(left - 16, y), (right, y)], "edge")
        figure.text(left - 22, y + 4, f"{int(tick):,}", "soft", anchor="end", style="small")
    for length in lengths:
        figure.text(at(length, 1)[0], bottom + 18, f"{length:,}", "soft", anchor="middle", style="small")
    for i, (color, line) in enumerate(lines.items()):
        points = [at(length, value) for length, value in line.items()]
        figure.line(points, color, width=2)
        for (x, y), value in zip(points, line.values(), strict=True):
            figure.dot(x, y, color)
            if x == right:
                figure.text(x + 8, y + 4, f"{value:,.0f}{unit}", style="small")
            elif not last:
                figure.text(x, y + (18 if i % 2 else -9), f"{value:,.0f}", anchor="middle", style="small")


def acceptance() -> str:
    """The tokens of a step with two drafts, where drafts are accepted and where they are not."""
    rows = {
        "cpu-demo-mtp": "demo checkpoint, its own questions",
        "cpu-mtp": "random weights: no draft is accepted",
    }
    left, right, row = 270, 560, 46
    figure = Drawing(760, 168, "Tokens per step with two drafts")
    figure.text(24, 32, "Tokens per step with two drafts (at most 3), vLLM, batches of 8", style="bold")
    for i, (name, title) in enumerate(rows.items()):
        found = results(name)["workloads"]["decode batch 8"]
        tokens, share = (statistics.median(found[key]["ours"]) for key in ("tokens per step", "acceptance"))
        y = 56 + row * i
        figure.text(left - 10, y + 18, title, "soft", anchor="end")
        figure.box(left, y, right - left, 26, "gray", opacity=0.35)
        figure.box(left, y, (right - left) * tokens / 3, 26, "a")
        figure.text(right + 10, y + 18, f"{tokens:.2f} tokens, {share:.0%} accepted")
    for tokens in range(4):
        figure.text(left + (right - left) * tokens / 3, 152, str(tokens), "soft", anchor="middle", style="small")
    return figure.render()


DRAWN = {
    "speed": speed,
    "memory": memory,
    "concurrency": concurrency,
    "context": context,
    "acceptance": acceptance,
    "row-order": row_order,
    "state-cache": state_cache,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    status = 0
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        file, drawn = FIGURES / f"{name}.svg", draw()
        if file.exists() and file.read_text() == drawn:
            continue
        if check:
            print(f"{file} differs from what is drawn from bench/results; run scripts/figures")
            status = 1
        else:
            file.write_text(drawn)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
