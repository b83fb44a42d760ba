"""The tables of measured results in README.md and ``docs/``, written from ``bench/results/*.json``.

    scripts/results [--check]

A table stands between ``<!-- results: FILE -->``, or a pattern for several, and ``<!-- end of results -->``. With
``agreement`` instead of ``results`` it is the summary of what ``qnext verify`` reported.
``--check`` changes nothing and fails where a document says something else than the files.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "mtp.md")
AGAINST = {
    "cpu-eager": "vLLM's own",
    "cpu-mtp": "vLLM's own, two drafts per step, none accepted",
    "cpu-demo-mtp": "vLLM's own, two drafts per step, demo checkpoint",
    "cpu-serve": "vLLM's own, over HTTP, compiled, four clients",
    "cpu-llama-cpp": "llama.cpp",
}
"""What the results of a file are against, without the CPU in its name."""
REGION = re.compile(
    r"(<!-- (?P<what>results|agreement): (?P<file>\S+) -->\n).*?(?P<end><!-- end of results -->)", re.DOTALL
)


def table(rows: list[list[str]]) -> str:
    head, *rest = rows
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rest])


def titles(found: dict[str, Any]) -> list[str]:
    """What the columns of the sides are called; a side that is named by an engine has other flags."""
    engine = found.get("engines", {}).get("native", "vllm").split()[0]
    own = {"native": f"{ {'vllm': 'vLLM', 'sglang': 'SGLang'}[engine] }'s own"}
    own |= dict.fromkeys(("vllm", "sglang"), "other flags")
    return [own.get(side, side) for side in found.get("sides", ["ours", "native"])]


def bench(found: dict[str, Any]) -> str:
    """Of ``qnext bench``: tokens per second of both sides, and how much of its limit the first reaches, if counted."""
    sides = found.get("sides", ["ours", "native"])
    limited, drafted = (all(key in row for row in found["workloads"].values()) for key in ("limit", "tokens per step"))
    rows = [["Workload", *titles(found), "ratio"]]
    rows[0] += ["ours, share of its limit"] * limited + ["tokens per step"] * drafted
    for name, row in found["workloads"].items():
        medians = [statistics.median(row[side]) for side in sides]
        ratios = [a / b for a, b in zip(*(row[side] for side in sides), strict=True)]
        spread = f"{row['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        share = [f"{medians[0] / row['limit'][sides[0]]:.0%}"] if limited else []
        steps = [f"{statistics.median(row['tokens per step'][sides[0]]):.2f}"] if drafted else []
        rows.append([name, *(f"{median:.0f}" for median in medians), spread, *share, *steps])
    return table(rows)


def served(found: dict[str, Any]) -> str:
    """Of ``qnext bench --serve``: as offline, then what its clients waited for."""
    return f"{bench(found)}\n{waits(found)}"


def llama_cpp(found: dict[str, Any]) -> str:
    """Of ``bench/llama_cpp.py``: as offline, then what a decode step is made of."""
    return f"{bench(found)}\n{decode_steps(found['decode steps'])}"


def quantized(found: dict[str, Any]) -> str:
    """Of ``bench/llama_cpp_quantized.py``: rates and errors of each form, then ratios to llama.cpp's best, by pair."""
    rates, names = found["workloads"], list(found["workloads"])
    rows = [["Weights", "GB", "mean error", *names]]
    ratios = [["Ours / llama.cpp's fastest", *names]]
    for bits, sides in found["forms"].items():
        for side, forms in sides.items():
            for form in forms:
                medians = [f"{statistics.median(rates[name][form]):.1f}" for name in names]
                size, error = f"{found['bytes'][form] / 1e9:.2f}", f"{found['errors'][form]:.3f}"
                rows.append([f"{bits}: {side}, {form}", size, error, *medians])
        for form in sides["ours"]:
            cells = []
            for name in names:
                others = zip(*(rates[name][other] for other in sides["llama.cpp"]), strict=True)
                each = [ours / max(best) for ours, best in zip(rates[name][form], others, strict=True)]
                cells.append(f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})")
            ratios.append([f"{bits}: {form}", *cells])
    return f"{table(rows)}\n{table(ratios)}"


def waits(found: dict[str, Any]) -> str:
    """Of ``qnext bench --serve``: the start, a request's first token and those after it."""
    sides = found["sides"]
    rows = [["", *titles(found)]]
    rows.append(["start-up, s", *(f"{statistics.median(found['start-up seconds'][side]):.0f}" for side in sides)])
    for name, row in found["workloads"].items():
        for key in ("first token ms", "further token ms"):
            rows.append([f"{name}: {key}", *(f"{statistics.median(row[key][side]):.0f}" for side in sides)])
    return table(rows)


def decode_steps(found: dict[str, Any]) -> str:
    """Of ``bench/llama_cpp.py``: the milliseconds of a step, of the model in it, and of reading what it needs."""
    rows = [["ms per step", "limit of memory", "our model", "model / limit", "rest of the engine", "ours", "llama.cpp"]]
    for name, row in found.items():
        model, step, other = (statistics.median(row[key]) for key in ("model ms", "step ms", "llama.cpp ms"))
        over = f"{model / row['limit ms']:.2f}"
        rows.append(
            [name, f"{row['limit ms']:.1f}", f"{model:.1f}", over, f"{step - model:.1f}", f"{step:.1f}", f"{other:.1f}"]
        )
    return table(rows)


def engines(found: dict[str, Any]) -> str:
    """Of ``bench/engines.py``: milliseconds of the model and of the whole, and ratios of speed pair by pair."""
    rows = [
        ["ms", "SGLang, model", "SGLang, all", "vLLM, model", "vLLM, all", "SGLang / vLLM, model", "SGLang / vLLM, all"]
    ]
    for name, by in found["times"].items():
        medians = [statistics.median(each) for times in by.values() for each in times.values()]
        ratios = [
            [vllm / sglang for sglang, vllm in zip(by["sglang"][each], by["vllm"][each], strict=True)]
            for each in by["sglang"]
        ]
        spreads = [f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})" for each in ratios]
        rows.append([name, *(f"{median:.1f}" for median in medians), *spreads])
    return table(rows)


def context(found: dict[str, Any]) -> str:
    """Of ``bench/context.py``: a layer's decode step by the length of the context."""
    times = found["microseconds by context"]
    lengths = sorted(next(iter(times.values())), key=int)
    rows = [["us per layer", *(f"{int(n):,} tokens" for n in lengths), "growth"]]
    for kind, by in times.items():
        rows.append([kind, *(f"{statistics.median(by[n]):.0f}" for n in lengths), f"{growth(times, kind):.2f}"])
    return table(rows)


def growth(times: dict[str, dict[Any, list[float]]], kind: str) -> float:
    """Median over rounds of the longest context's time over the shortest's, each in that of the experts."""
    shortest, longest = min(times[kind], key=int), max(times[kind], key=int)
    columns = (times[name][length] for length in (longest, shortest) for name in (kind, "experts"))
    return statistics.median(a / b / (c / d) for a, b, c, d in zip(*columns, strict=True))


def gpu_check(found: dict[str, Any]) -> str:
    """The tables of ``scripts/gpu-check``: what was tested, then what was measured."""
    results = found["results"]
    rows = [["Tested", "passed", "failed", "left out", "largest error or difference"]]
    for kind in ("layer", "ops", "engines"):
        mine = [result for result in results if result["kind"] == kind]
        counts = [str(sum(r["outcome"] == outcome for r in mine)) for outcome in ("passed", "failed", "skipped")]
        errors = [r[name] for r in mine for name in ("error", "difference") if name in r]
        rows += [[kind, *counts, f"{max(errors):.2g}" if errors else ""]] if mine else []
    parts = [f"{found['gpu']}, torch {found['torch']}:\n", table(rows)]

    steps = [["One layer", "us", "against native", "share of the ceiling"]]
    for result in results:
        if result["kind"] == "speed" and "ours_us" in result:
            speedup = f"{result['speedup']:.2f}" if "speedup" in result else ""
            share = f"{result['of_peak']:.0%}" if "of_peak" in result else ""
            name = result["test"].rpartition("::test_")[2]
            steps.append([name, f"{result['ours_us']:.0f}", speedup, share])
    if len(steps) > 1:
        parts.append(table(steps))

    last = {result["mtp"]: result for result in results if "workloads" in result}
    for drafts, result in last.items():
        parts += [f"MTP {drafts}, tokens per second end to end:\n", bench(result)]
    return "\n".join(parts)


def verify(runs: list[dict[str, Any]]) -> str:
    """Of ``qnext verify``, a column each: the largest difference, in bfloat16 the usual one and its bound."""
    columns = {
        title: {(row["start"], row["scenario"]): row for row in run["rows"]} for title, run in by_title(runs).items()
    }

    def cell(row: dict[str, Any] | None, exact: bool) -> str:
        if row is None:
            return ""
        if row["difference"] is None:
            return row["verdict"].split(":")[0]
        found = row["difference"]["max" if exact else "usual"]
        text = f"{found:.1e}" if exact else f"{found:.3f} of {row['usual_bound']:.3f}"
        return text if row["verdict"] == "ok" else f"**{text}**"

    keys = dict.fromkeys(key for rows in columns.values() for key in rows if not key[1].endswith(" again"))
    table_rows = [["start", "scenario", *columns]]
    for key in keys:
        table_rows.append([*key, *(cell(rows.get(key), "float32" in title) for title, rows in columns.items())])
    passed = [[row["verdict"] == "ok" for row in rows.values()] for rows in columns.values()]
    table_rows.append(["all", "second passes included", *(f"{sum(ok)} of {len(ok)} ok" for ok in passed)])
    return table(table_rows)


def agreement(runs: list[dict[str, Any]]) -> str:
    """Of ``qnext verify``, a row each: the scenarios that agree, and how much of its bound the worst of all takes."""
    rows = [["Served by", "scenarios that agree", "largest error, as a share of its bound"]]
    for title, run in by_title(runs).items():
        measured = [row for row in run["rows"] if row["difference"]]
        keys = ("max", "usual", "sustained")
        shares = [r["difference"][key] / r[f"{key}_bound"] for r in measured for key in keys if r.get(f"{key}_bound")]
        agree = sum(row["verdict"] == "ok" for row in run["rows"])
        rows.append([title, f"{agree} of {len(run['rows'])}", f"{max(shares):.0%}"])
    return table(rows)


def by_title(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs of ``qnext verify`` by the model, engine and dtype that they are about, in the order of the tables."""
    found = {}
    for run in sorted(runs, key=lambda run: (run["dtype"] != "float32", run["native"], "sglang" in run["versions"])):
        engine = "SGLang" if "sglang" in run["versions"] else "vLLM"
        found[f"{engine}'s own, {run['dtype']}" if run["native"] else f"{engine}, {run['dtype']}"] = run
    return found


def speeds(files: dict[str, dict[str, Any]]) -> str:
    """Of ``qnext bench`` and ``bench/llama_cpp.py`` on two CPUs: our rate, how many times the other side's it is."""
    rows = [["Against", "Workload", "CPU with AVX512-BF16", "with AVX2 alone"]]
    for name, title in AGAINST.items():
        found = [files.get(name.replace("cpu-", cpu), {}).get("workloads", {}) for cpu in ("cpu-", "cpu-avx2-")]
        for workload in found[0] or found[1]:
            each = [row.get(workload) for row in found]
            cells = [f"{statistics.median(row['ours']):.0f}, {row['ratio']:.2f}x" if row else "" for row in each]
            rows.append([title, workload, *cells])
    return table(rows)


KINDS = {
    "offline": bench,
    "served": served,
    "llama.cpp": llama_cpp,
    "llama.cpp quantized": quantized,
    "engines": engines,
    "context": context,
    "gpu-check": gpu_check,
}


def written(document: str) -> str:
    """``document`` with every table as its files have it."""

    def region(match: re.Match[str]) -> str:
        runs = {file.stem: json.loads(file.read_text()) for file in sorted(ROOT.glob(match["file"]))}
        first, *more = runs.values()
        if first["kind"] == "verify":
            made = {"results": verify, "agreement": agreement}[match["what"]](list(runs.values()))
        else:
            made = speeds(runs) if more else KINDS[first["kind"]](first)
        return f"{match[1]}\n{made}\n{match['end']}"

    return REGION.sub(region, document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    status = 0
    for document in DOCUMENTS:
        text = document.read_text()
        if written(text) == text:
            continue
        if check:
            print(f"{document} differs from bench/results; run scripts/results")
            status = 1
        else:
            document.write_text(written(text))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
