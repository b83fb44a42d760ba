"""The GPU kernels' calls without a GPU: ``scripts/gpu-check`` with vLLM's Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_gpu_kernels_agree_with_the_oracle_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    file = tmp_path / "out.json"
    done = subprocess.run(["scripts/gpu-check", "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    checks = [check for check in json.loads(file.read_text())["checks"] if check["section"] == "kernels"]
    ran = {kernel for check in checks for kernel in check.get("kernels", "").split("; ")}
    expected = {"prefill: triton, triton", "prefill: triton, torch", "decode: triton, triton", "verify: triton, triton"}
    expected.add("step: one launch")
    assert expected <= ran
    assert sum(check["status"] == "ok" for check in checks) >= 12
