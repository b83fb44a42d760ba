"""What ``scripts/gpu-check`` does with the results of tests, and where there is no GPU; the tests are in ``gpu/``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import tables
from tests.gpu import __main__ as gpu_check
from tests.gpu import sglang_cases
from tests.gpu.results import read


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs tests, given as code, as a group until ``seconds`` from now: results by name of the test."""

    def ran(code, seconds=60.0):
        (tmp_path / "conftest.py").write_text("from tests.gpu.results import *\n")
        (tmp_path / "test_it.py").write_text(f"import os, time, pytest\n{code}")
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timeout(seconds)\n")
        monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, [str(tables.ROOT), *sys.path])))
        arguments = ["--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
        group = gpu_check.Group("it", arguments, tmp_path, time.time() + seconds)
        group.start()
        while not group.ended():
            time.sleep(0.05)
        return {test.rpartition("::")[2]: result for test, result in read(group.results).items()}

    return ran


def outcomes(found):
    return {test: result["outcome"] for test, result in found.items()}


def test_results_are_data(run):
    found = run(
        "def test_good(record_property): record_property('error', 0.5)\n"
        + "def test_bad(record_property):\n    record_property('error', 2)\n    1 / 0\n"
    )
    assert found["test_good"] | {"seconds": 0} == {
        "kind": "it",
        "test": "test_it.py::test_good",
        "outcome": "passed",
        "seconds": 0,
        "error": 0.5,
    }
    assert found["test_bad"]["outcome"] == "failed" and found["test_bad"]["error"] == 2
    assert "ZeroDivisionError" in found["test_bad"]["reason"]


def test_after_the_deadline_nothing_runs(run):
    found = run("def test_late(): assert False\n", seconds=-1)
    assert found["test_late"]["outcome"] == "skipped" and found["test_late"]["reason"] == "out of time"


def test_a_process_that_dies_or_loses_its_gpu_is_started_again_for_what_is_left(run):
    found = run(
        "@pytest.fixture(autouse=True)\n"
        "def pid(record_property): record_property('pid', os.getpid())\n"
        "def test_first(): pass\n"
        "def test_crash(): os.kill(os.getpid(), 9)\n"
        "def test_device_lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_last(): pass\n"
    )
    assert outcomes(found) == {
        "test_first": "passed",
        "test_crash": "failed",
        "test_device_lost": "failed",
        "test_last": "passed",
    }
    assert "status -9" in found["test_crash"]["reason"]
    assert len({found[test]["pid"] for test in ("test_first", "test_device_lost", "test_last")}) == 3


def test_a_test_that_hangs_is_ended_and_costs_no_other(run):
    found = run("@pytest.mark.timeout(1)\n" + "def test_hang(): time.sleep(600)\n" + "def test_last(): pass\n")
    assert outcomes(found) == {"test_hang": "failed", "test_last": "passed"}
    assert "Timeout" in found["test_hang"]["reason"]


def test_a_process_that_hangs_outside_of_tests_is_ended(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)
    monkeypatch.setattr(gpu_check, "SHORTEST", 2.0)
    found = run("time.sleep(600)\n", seconds=2)
    assert outcomes(found) == {"tests/gpu/it": "failed"}
    assert "still running when its time was up" in found["tests/gpu/it"]["reason"]


def test_tests_that_cannot_be_read_have_failed(run):
    assert outcomes(run("raise SystemError('no such GPU')\n")) == {"tests/gpu/it": "failed"}


def test_table_of_a_gpu_run():
    made = tables.gpu_check(
        {
            "gpu": "NVIDIA H200",
            "torch": "2.13.0",
            "results": [
                {"kind": "layer", "test": "tests/gpu/test_layer.py::test_a", "outcome": "passed", "error": 0.02},
                {"kind": "layer", "test": "tests/gpu/test_layer.py::test_b", "outcome": "failed", "reason": "x"},
                {
                    "kind": "speed",
                    "test": "tests/gpu/test_speed.py::test_step[0-1]",
                    "outcome": "passed",
                    "ours_us": 12.3,
                    "of_peak": 0.5,
                },
                {
                    "kind": "serving",
                    "test": "tests/gpu/test_serving.py::test_pair[1-2]",
                    "outcome": "passed",
                    "mtp": 2,
                    "workloads": {"decode batch 1": {"ours": [110, 112], "native": [100, 100], "ratio": 1.11}},
                },
            ],
        }
    )
    assert "| layer | 1 | 1 | 0 | 0.02 |" in made
    assert "| step[0-1] | 12 |  | 50% |" in made
    assert "MTP 2, tokens per second" in made
    assert "| decode batch 1 | 111 | 100 | 1.11 (1.10-1.12) |" in made


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda document: document.name)
def test_documents_say_what_the_result_files_say(document):
    assert tables.written(document.read_text()) == document.read_text()


def test_without_a_gpu_it_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = ["scripts/gpu-check", "-k", "experts or pair", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 1, done.stderr  # nothing passed
    assert found["gpu"] is None and found["kind"] == "gpu-check"
    assert {result["kind"] for result in found["results"]} == {"speed", "serving"}
    assert {(result["outcome"], result["reason"]) for result in found["results"]} == {("skipped", "no GPU")}
    assert "no GPU: kernels run in an interpreter" in done.stdout and "10 no GPU" in done.stdout


def test_starts_of_sglang_cover_its_modes():
    configs = [case["config"] for case in sglang_cases.CASES.values()]
    default = {"dtype": "bfloat16", "compiled": True, "prefix_caching": True, "snapshots": "extra_buffer"}
    of_a_server = [config for config in configs if all(getattr(config, name) == x for name, x in default.items())]
    assert {bool(config.draft_tokens) for config in of_a_server} == {False, True}
    covered = {
        "dtype": {"bfloat16", "float16"},
        "compiled": {False, True},
        "prefix_caching": {False, True},
        "snapshots": {"extra_buffer", "no_buffer"},
        "draft_tokens": {0, 3},
        "tree": {0, 8},
        "token_budget": {None, 256},
    }
    for name, values in covered.items():
        assert {getattr(config, name) for config in configs} == values, name
    assert sum(case["quick"] for case in sglang_cases.CASES.values()) == 2
