"""`qnext bench` from the command line: each side is served by its own classes, and nothing is left out."""

import json

import pytest
import torch

from qnext_plugin.engines import process
from tests.support.installed import ENGINE

pytestmark = pytest.mark.exhaustive

OPTIONS = ("--pairs", "1", "--mtp", "2", "--input-len", "20", "--output-len", "12")
# SGLang's own model does not run on a CPU.
SIDES = ["ours", "native"] if ENGINE == "vllm" or torch.cuda.is_available() else ["ours"]
EAGER = {"vllm": ["--enforce-eager"], "sglang": []}[ENGINE]
NATIVE = {"vllm": "vllm.model_executor.models.qwen3_next", "sglang": "sglang.srt.models.qwen3_next"}
ABOUT = {"command", "model", "machine", "date", "sides", "engines", "modules", "ranks", "dtype", "mtp", "ceilings"}
ABOUT |= {"start-up seconds", "first request seconds", "peak resident bytes", "workloads"}


def qnext_bench(tmp_path, checkpoint, *options):
    command = ["bench", str(checkpoint("bfloat16")), "--engine", ENGINE, "--json", str(tmp_path / "json"), *OPTIONS]
    command += ["--against", SIDES[-1] if SIDES[1:] else "none", *EAGER]
    status = process.run(["-m", "qnext_plugin.cli", *command, *options], tmp_path / "log", timeout=900)
    printed = (tmp_path / "log").read_text()
    assert status == 0, printed
    print(printed)
    return printed, json.loads((tmp_path / "json").read_text())


def check_about(report, kind, positive):
    assert report.keys() >= ABOUT and report["kind"] == kind
    assert report["sides"] == SIDES and report["mtp"] == 2
    for name in ("start-up seconds", "first request seconds", "peak resident bytes"):
        assert all(len(report[name][side]) == 1 and report[name][side][0] > 0 for side in SIDES)
    assert all(1e8 < rate < 1e16 for rate in report["ceilings"].values())
    assert all(row[side][0] > 0 for row in report["workloads"].values() for side in SIDES)
    for name in positive:
        assert all(row[name][side][0] > 0 for row in report["workloads"].values() for side in SIDES), name


def test_offline(tmp_path, checkpoint):
    printed, report = qnext_bench(tmp_path, checkpoint, "--prefill", "2x96", "--batch", "1", "3")
    check_about(report, "offline", ())
    assert set(report["modules"]["ours"]) == {f"{ENGINE}_ext.model", f"{ENGINE}_ext.mtp"}
    for side in SIDES[1:]:
        assert report["modules"][side] and all(name.startswith(NATIVE[ENGINE]) for name in report["modules"][side])
    assert report["ranks"] == 1
    workloads = report["workloads"]
    assert list(workloads) == ["prefill 2x96", "decode batch 1", "decode batch 3"]
    assert all(row["limit"][side] > 0 for row in workloads.values() for side in SIDES)
    for name in ("decode batch 1", "decode batch 3"):
        for side in SIDES:
            assert 1 <= workloads[name]["tokens per step"][side][0] <= 3
            assert 0 <= workloads[name]["acceptance"][side][0] <= 1
            assert workloads[name]["looping"][side][0] in range(4)
    assert all("ratio" in row for row in workloads.values()) == bool(SIDES[1:])
    assert all(name in printed for name in (*workloads, "limit tok/s", "acceptance, ours", "GFLOP/s in bfloat16"))


def test_over_http(tmp_path, checkpoint):
    printed, report = qnext_bench(tmp_path, checkpoint, "--serve", "--batch", "3")
    check_about(report, "served", ("first token ms", "further token ms"))
    assert f"{ENGINE}_ext.model" in report["modules"]["ours"]
    assert list(report["workloads"]) == ["serve 3"] and "first token ms, ours" in printed
