"""The GPU kernels' calls without a GPU: ``scripts/gpu-check`` with vLLM's Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu.cases import CASES

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
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"layer": 15, "ops": 6, "speed": 4}


class Model:
    """Stands for a model that serves."""


class Draft:
    """Stands for a draft that serves."""


@pytest.mark.parametrize("runner", ["gpu_model_runner", "gpu.model_runner"])
def test_what_serves_is_found_in_either_model_runner_with_full_graphs(monkeypatch, runner):
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    from vllm_ext.tools.inside import runner_module, serving_modules

    monkeypatch.setattr(Model, "__module__", "vllm_ext.model")
    monkeypatch.setattr(Draft, "__module__", "vllm_ext.mtp")
    module = import_module(f"vllm.v1.worker.{runner}")
    made = module.GPUModelRunner.__new__(module.GPUModelRunner)
    made.model = Model()
    made.vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(method="mtp"))
    if runner == "gpu_model_runner":
        made.model = CUDAGraphWrapper.__new__(CUDAGraphWrapper)
        made.model.runnable = Model()
        made.drafter = SimpleNamespace(model=Draft())
    else:
        speculator = type("Speculator", (module.DraftModelSpeculator,), {})
        speculator.__abstractmethods__ = frozenset()
        made.speculator = speculator.__new__(speculator)
        made.speculator.model = Draft()
    worker = SimpleNamespace(model_runner=made)
    assert serving_modules(worker) == {"vllm_ext.model", "vllm_ext.mtp"}
    assert runner_module(worker) == f"vllm.v1.worker.{runner}"


@pytest.mark.parametrize("drafts", [False, True])
def test_a_start_on_a_gpu_is_what_vllm_serve_does(drafts):
    """In bfloat16 with prefix caching, graphs, the second runner and vLLM's own choice of kernels for prompts."""

    def is_default(case):
        config, flags = case.config, " ".join(case.config.flags)
        graphs = config.compiled and '"cudagraph_mode": "FULL_AND_PIECEWISE"' in flags
        return case.v2 and graphs and config.prefix_caching and '"gdn_prefill_backend": "auto"' in flags

    assert any(
        is_default(case) and case.config.dtype == "bfloat16" and bool(case.config.draft_tokens) == drafts
        for case in CASES["vllm"].values()
    )
