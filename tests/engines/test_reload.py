"""New weights for an engine that serves: afterwards it answers as one that started with them, or as before."""

import json

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines import process
from qnext_plugin.verify.comparison import Result, compare
from tests.engines.conftest import whole
from tests.engines.test_logprobs import TOLERANCE, compare_draft
from tests.support.checkpoints import CHECKPOINTS
from tests.support.installed import ENGINE

pytestmark = pytest.mark.engine

CHANGED = "model.layers.1.linear_attn.in_proj_qkvz.weight"
MISSHAPEN = ["wrongly shaped", "layers.3.self_attn.k_proj.weight [3, 5]"]
# Which checkpoint serves after each step, and what is said of weights that do not fit.
STEPS = {
    "vllm": {"fresh": "old", "disk": "new", "direct": "old", "transfer": "new", "recovered": "old"},
    "sglang": {"fresh": "old", "disk": "new", "tensors": "old", "recovered": "new"},
}[ENGINE]
REFUSED = {
    "vllm": {
        "disk missing": ["missing", CHANGED],
        "disk misshapen": ["wrongly shaped", CHANGED],
        "transfer misshapen": MISSHAPEN,
        "draft misshapen": ["wrongly shaped", "mtp.fc.weight [3, 5]"],
        "draft without mtp": ["missing", "mtp.fc.weight"],
        "broken": ["the stream broke"],
        "direct misshapen": MISSHAPEN,
        "direct unknown": ["unexpected", "model.layers.3.self_attn.surprise"],
        "direct part": ["a part of model.layers.3.self_attn.qkv_proj", "pass all of its tensors at once"],
    },
    "sglang": {
        "disk missing": ["missing", CHANGED],
        "disk misshapen": ["wrongly shaped", CHANGED],
        "disk without mtp": ["missing", "mtp.fc.weight"],
        "draft misshapen": ["wrongly shaped", "mtp.fc.weight [3, 5]"],
        "tensors misshapen": MISSHAPEN,
        "tensors unknown": ["unexpected", "model.layers.3.self_attn.surprise"],
    },
}[ENGINE]


@pytest.fixture(scope="module")
def directories(tmp_path_factory, checkpoint):
    """Checkpoints by name: the one served first, another of the same shapes, and three that are damaged."""
    root, others = tmp_path_factory.mktemp("reload"), ("new", "missing", "misshapen", "undrafted")
    spec = {"old": checkpoint("tiny")} | {name: root / name for name in others}
    for name in others:
        write_random_checkpoint(spec[name], dtype="float32", seed=7, overrides=CHECKPOINTS["tiny"])
    for damage in ("missing", "misshapen"):
        tensors = load_file(spec[damage] / "model.safetensors")
        whole = tensors.pop(CHANGED)
        if damage == "misshapen":
            tensors[CHANGED] = whole[:-1].clone()
        save_file(tensors, spec[damage] / "model.safetensors", metadata={"format": "pt"})
    tensors = load_file(spec["undrafted"] / "model.safetensors")
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(trunk, spec["undrafted"] / "model.safetensors", metadata={"format": "pt"})
    return spec


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, directories):
    root = tmp_path_factory.mktemp("outcome")
    (root / "spec.json").write_text(json.dumps({name: str(path) for name, path in directories.items()}))
    command = ["-m", f"tests.workers.{ENGINE}_reload", str(root / "spec.json"), str(root / "out.json")]
    status = process.run(command, root / "log")
    assert (root / "out.json").exists(), process.tail(root / "log")
    return json.loads((root / "out.json").read_text()) | {
        "status": status,
        "log": (root / "log").read_text(),
        "answers": {file.stem: Result.load(file) for file in root.glob("*.safetensors")},
    }


def assert_answers(outcome, step, checkpoint):
    difference = compare(outcome["answers"][f"{step}.short"], whole(checkpoint), TOLERANCE)
    print(f"{step}: {difference.max:.2g} at {difference.worst}")
    assert difference.max <= TOLERANCE, f"{step}: {difference.max:.3g} at {difference.worst}"


@pytest.mark.parametrize("step", STEPS)
def test_model_is_the_one_loaded_last(outcome, directories, step):
    assert_answers(outcome, step, directories[STEPS[step]])


@pytest.mark.parametrize("step", REFUSED)
def test_weights_that_do_not_fit_change_nothing(outcome, directories, step):
    error = outcome["errors"][step]
    for word in REFUSED[step]:
        assert word in error, error
    *_, before = (serves for done, serves in STEPS.items() if done != "recovered")
    assert_answers(outcome, step, directories[before])


def test_a_mix_of_old_and_new_weights_does_not_serve(outcome):
    errors = outcome["errors"]
    assert "wrongly shaped" in errors["late"]
    if ENGINE == "vllm":
        assert "update is incomplete" in errors["after late"] and "start again" in errors["after late"]
        assert "update is incomplete" in errors["after part"] and "layers.3.self_attn.qkv_proj" in errors["after part"]
        assert "wrongly shaped" in errors["draft late"] and "update is incomplete" in errors["after draft late"]
        assert not errors["draft recovered"]
    else:
        asked = outcome["log"].partition("a mix of old and new weights is asked")[2]
        assert "it served" not in asked and outcome["status"] != 0
        assert "update is incomplete" in asked
        # Where SGLang's runner chooses between the model and its graph.
        assert "_forward_raw" not in asked


if ENGINE == "vllm":

    @pytest.mark.parametrize("step", ["fresh", "direct", "transfer"])
    def test_draft_is_the_one_loaded_last(outcome, directories, step):
        difference = compare_draft(outcome["answers"][f"{step}.draft_logits"], directories[STEPS[step]])
        assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
