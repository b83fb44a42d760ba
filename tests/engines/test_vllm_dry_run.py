"""vLLM on a GPU that is not there: our model and vLLM's own, in every kind of batch; see ``docs/gpu.md``.

``scripts/setup dry`` makes the environment. ``tests/test_gpu_dry_run.py`` compares what the starts recorded.
"""

import json

import pytest

from tests.gpu.dry.starts import VLLM, call

pytestmark = [pytest.mark.only("vllm")]
EXHAUSTIVE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in VLLM.starts if name != "ours"]


@pytest.mark.parametrize("name", ["ours", *EXHAUSTIVE])
def test_a_start_launches_what_is_recorded(tmp_path, name):
    """It serves every kind of batch and compiles every kernel."""
    VLLM.repeat(tmp_path, name)


@pytest.mark.exhaustive
def test_flash_linear_attention_agrees_with_the_oracle_in_the_interpreter(tmp_path):
    out, log = tmp_path / "out.json", tmp_path / "log"
    call("dry", log, "tests.gpu.fla_oracle", out)
    assert out.exists(), log.read_text()[-3000:]
    found = json.loads(out.read_text())
    assert max(found.pop("bfloat16")) < 0.03
    assert found and all(max(differences) < 1e-5 for differences in found.values()), found


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("wait", "DataDependentOutputException"),
        ("host_tensor", "FakeTensorDeviceMismatchError"),
        ("strided_slots", "state_indices must be contiguous"),
        ("off_by_one", "out must have shape"),
    ],
)
def test_a_mistake_is_noticed(tmp_path, mistake, words):
    assert words in VLLM.run(tmp_path, ["--drafts", "2", "--mutant", mistake], "dry")["failure"]
