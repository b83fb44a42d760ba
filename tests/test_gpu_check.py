"""What ``scripts/gpu-check`` does with its workers' results; what it checks: ``engines/test_vllm_gpu_check.py``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import tables
from bench.gpu_check.__main__ import Worker
from bench.gpu_check.report import FAILED, LEFT_OUT, OK, RUNNING, Report, read


def worker(folder, code):
    """A worker whose module is ``code``."""
    (folder / "gpu_check_worker.py").write_text(
        "import argparse, os, pathlib, time\n"
        "from bench.gpu_check.report import Report\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--out', type=pathlib.Path)\n"
        "parser.add_argument('--deadline', type=float)\n"
        "args = parser.parse_args()\n"
        "report = Report('section', args.out, args.deadline)\n" + code
    )
    return Worker("worker", "section", ["gpu_check_worker"], folder)


def outcome(worker, seconds, monkeypatch):
    monkeypatch.syspath_prepend(worker.folder)
    monkeypatch.setenv("PYTHONPATH", f"{worker.folder}:{':'.join(p for p in sys.path if p)}")
    worker.start(time.time() + seconds)
    while not worker.ended():
        time.sleep(0.05)
    return {check: record["status"] for (_, check), record in read(worker.records).items()}


def test_a_failing_check_costs_no_other(tmp_path):
    report = Report("section", tmp_path / "out", time.time() + 60)
    report.run("bad", lambda: 1 / 0)
    report.run("good", lambda: {"error": 0.5})
    records = read(tmp_path / "out")
    assert records["section", "bad"]["status"] == FAILED
    assert "ZeroDivisionError" in records["section", "bad"]["reason"]
    assert records["section", "good"] | {"seconds": 0} == {
        "section": "section",
        "check": "good",
        "status": OK,
        "seconds": 0,
        "error": 0.5,
    }


def test_a_check_after_the_deadline_is_left_out(tmp_path):
    report = Report("section", tmp_path / "out", time.time() - 1)
    report.run("late", lambda: pytest.fail("ran"))
    assert read(tmp_path / "out")["section", "late"]["status"] == LEFT_OUT


def test_a_worker_that_dies_is_started_again_for_what_is_left(tmp_path, monkeypatch):
    code = (
        "report.run('first', dict)\n"
        "report.run('crash', lambda: os.kill(os.getpid(), 9))\n"
        "def lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "report.run('device lost', lost)\n"
        "report.run('last', dict)\n"
    )
    found = outcome(worker(tmp_path, code), 60, monkeypatch)
    assert found == {"first": OK, "crash": FAILED, "device lost": FAILED, "last": OK}


def test_a_worker_that_hangs_is_ended_and_keeps_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu_check.__main__.GRACE", 0)
    code = "report.run('first', dict)\nreport.run('hang', lambda: time.sleep(600))\n"
    found = outcome(worker(tmp_path, code), 4, monkeypatch)
    assert found == {"first": OK, "hang": FAILED, "worker": FAILED}


def test_a_worker_that_never_starts_has_failed(tmp_path, monkeypatch):
    assert outcome(worker(tmp_path, "raise SystemExit(3)\n"), 60, monkeypatch) == {"worker": FAILED}


def test_running_is_not_the_last_word(tmp_path):
    report = Report("section", tmp_path / "out", time.time() + 60)
    report.add("check", RUNNING)
    Report("section", tmp_path / "out", time.time() + 60)
    assert read(tmp_path / "out")["section", "check"]["status"] == FAILED


def test_table_of_a_gpu_run():
    made = tables.gpu_check(
        {
            "gpu": "NVIDIA H200",
            "torch": "2.13.0",
            "checks": [
                {"section": "kernels", "check": "a", "status": "ok", "error": 0.02},
                {"section": "kernels", "check": "b", "status": "FAILED", "reason": "x"},
                {"section": "timing", "check": "decode, batch 1", "status": "ok", "ours_us": 12.3, "of_peak": 0.5},
                {
                    "section": "serving",
                    "check": "MTP 2, pair 1 of 2",
                    "status": "ok",
                    "workloads": {"decode batch 1": {"ours": [110, 112], "native": [100, 100], "ratio": 1.11}},
                },
            ],
        }
    )
    assert "| kernels | 1 | 1 | 0 | 0.02 |" in made
    assert "| decode, batch 1 | 12 |  | 50% |" in made
    assert "| decode batch 1 | 111 | 100 | 1.11 (1.10-1.12) |" in made


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda document: document.name)
def test_documents_say_what_the_result_files_say(document):
    assert tables.written(document.read_text()) == document.read_text()


def test_without_a_gpu_it_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = ["scripts/gpu-check", "--only", "timing", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True)
    checks = {c["check"]: c for c in json.loads((tmp_path / "out.json").read_text())["checks"]}
    assert done.returncode == 1  # nothing was checked
    assert checks["timing"]["status"] == LEFT_OUT and checks["timing"]["reason"] == "no GPU", done.stderr
