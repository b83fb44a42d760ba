"""What `qnext doctor` makes of a report; tests/engines/test_doctor.py has real ones."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from qnext_plugin.cli import doctor, main
from qnext_plugin.engines import probe

GOOD = {
    "engine": "vllm",
    "version": "0.32.0",
    "tested_range": ">=0.32,<0.34",
    "in_tested_range": True,
    "switched_off_by": [],
    "classes": {"target": "vllm_ext.model.Qwen3NextForCausalLM", "draft": "vllm_ext.mtp.Qwen3NextMTP"},
    "kernels": {"prefill": ["torch, cpp", "no C++ convolution: it takes width 4, not 3"]},
    "replacements": [["engine.worker:Runner.step", "it waits for a GPU"]],
    "errors": [],
    "risks": [["vLLM leaves one core idle", "VLLM_CPU_OMP_THREADS_BIND=nobind"]],
}
NATIVE = {"classes": {"target": "vllm.model_executor.models.qwen3_next.Qwen3NextForCausalLM"}, "kernels": {}}


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        (
            {},
            0,
            [
                "vLLM 0.32.0: qnext-plugin serves",
                "(no C++ convolution: it takes width 4, not 3)",
                "replaced      engine.worker:Runner.step: it waits for a GPU",
                "note: vLLM leaves",
            ],
        ),
        ({"errors": ["tensor missing"]}, 1, ["qnext-plugin does not serve", "error: tensor missing"]),
        (NATIVE, 1, ["the engine's own model serves\n"]),
        (NATIVE | {"switched_off_by": ["QNEXT_DISABLE"]}, 1, ["QNEXT_DISABLE turned qnext-plugin off"]),
        ({"version": "1.0", "in_tested_range": False}, 0, [">=0.32,<0.34: outside of it"]),
    ],
)
def test_text_and_exit_status(monkeypatch, capsys, changes, status, words):
    report = GOOD | changes
    serves = report["classes"]["target"].startswith("vllm_ext.") and not report["errors"]
    monkeypatch.setattr(doctor, "find_spec", lambda engine: engine == "vllm")
    monkeypatch.setattr(doctor, "examine", lambda engine, model, flags: report | {"serves": serves})
    assert main(["doctor", "MODEL", "--tensor-parallel-size", "2"]) == status
    text = capsys.readouterr().out
    for word in words:
        assert word in text


def test_flags_of_the_engine_reach_it(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(doctor, "find_spec", lambda engine: engine == "sglang")
    monkeypatch.setattr(doctor, "examine", lambda *question: asked.append(question) or {**GOOD, "serves": True})
    assert main(["doctor", "MODEL", "--tp-size", "2", "--engine", "sglang", "--json"]) == 0
    assert asked == [("sglang", "MODEL", ["--tp-size", "2"])]


def test_no_engine_here(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda engine: None)
    assert main(["doctor"]) == 2
    assert "vllm or sglang is not installed in this environment" in capsys.readouterr().err


def test_our_reason_comes_before_that_of_the_engine(monkeypatch, tmp_path):
    """Where the engine refuses a checkpoint before the model's own check is reached."""
    config = {"model_type": "qwen3_next", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = SimpleNamespace(__version__="1", TESTED=">=1", verdict=lambda: SimpleNamespace(message="", serves=True))
    monkeypatch.setattr(probe, "import_module", lambda name: module)
    classes, examine = {"target": "vllm_ext.M"}, Mock(side_effect=RuntimeError("Unknown quantization method"))

    def errors(model):
        return probe.make_report("vllm_ext", "vllm", (), (), lambda: classes, examine, model, [])["errors"]

    assert [error.split(",")[0] for error in errors(str(tmp_path))] == [f"{tmp_path}: quantized with bitsandbytes"]
    (tmp_path / "config.json").write_text("{}")
    assert [error.split(" (")[0] for error in errors(str(tmp_path))] == ["RuntimeError: Unknown quantization method"]
