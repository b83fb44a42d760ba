"""The GPU kernels' calls without a GPU: ``scripts/gpu-check`` with vLLM's Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def test_gpu_kernels_agree_with_the_oracle_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    file = tmp_path / "out.json"
    done = subprocess.run(["scripts/gpu-check", "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = [result for result in json.loads(file.read_text())["results"] if result["outcome"] == "passed"]
    ran = {kernel for result in passed for kernel in result.get("kernels", [])}
    assert ran == {f"{phase}: triton, triton" for phase in ("prefill", "decode", "verify")} | {"prefill: triton, torch"}
    kinds = [result["kind"] for result in passed]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"layer": 11, "ops": 6, "speed": 4}
