"""New weights for an engine that serves: afterwards it answers as one that started with them, or as before."""

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.verify.comparison import Result, compare
from tests.support.checkpoints import CHECKPOINTS
from tests.support.installed import ENGINE
from tests.support.references import TOLERANCE, compare_draft, whole
from tests.support.workers import call

CHANGED = "model.layers.1.linear_attn.in_proj_qkvz.weight"
MISSHAPEN = ["wrongly shaped", "layers.3.self_attn.k_proj.weight [3, 5]"]
# Which checkpoint serves after each step, and what is said of weights that do not fit.
STEPS = {
    "vllm": {
        **{"fresh": "old", "disk": "new", "megabytes": "old", "kilobytes": "new"},
        **{"direct": "old", "transfer": "new", "recovered": "old"},
    },
    "sglang": {
        **{"fresh": "old", "megabytes": "new", "kilobytes": "old", "disk": "new", "tensors": "old"},
        "recovered": "new",
    },
}[ENGINE]
REFUSED = {
    "vllm": {
        "disk missing": ["missing", CHANGED],
        "disk misshapen": ["wrongly shaped", CHANGED],
        "transfer misshapen": MISSHAPEN,
        "draft misshapen": ["wrongly shaped", "mtp.fc.weight [3, 5]"],
        "draft without mtp": ["the checkpoint has no mtp.* tensors"],
        "broken": ["the stream broke"],
        "direct misshapen": MISSHAPEN,
        "direct unknown": ["unexpected", "model.layers.3.self_attn.surprise"],
        "direct part": ["a part of model.layers.3.self_attn.qkv_proj", "pass all of its tensors at once"],
    },
    "sglang": {
        "disk missing": ["missing", CHANGED],
        "disk misshapen": ["wrongly shaped", CHANGED],
        "disk without mtp": ["the checkpoint has no mtp.* tensors"],
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
        write_random_checkpoint(spec[name], dtype="float32", seed=8, overrides=CHECKPOINTS["tiny"])
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
def outcome(tmp_path_factory, directories, warm):
    root = tmp_path_factory.mktemp("outcome")
    asked = {"checkpoints": {name: str(path) for name, path in directories.items()}, "directory": str(root)}
    with warm.forking():
        errors, mix = {"vllm": reload_vllm, "sglang": reload_sglang}[ENGINE](root, asked)
    answers = {file.stem: Result.load(file) for file in root.glob("*.safetensors")}
    return {"errors": errors, "mix": mix, "answers": answers}


def reload_vllm(root, asked):
    return call("vllm_reload:reload", root / "engine", timeout=400, **asked), None


def reload_sglang(root, asked):
    """The errors, and why the server ends when a mix of old and new weights is asked."""
    model, config = asked["checkpoints"]["old"], EngineConfig(draft_tokens=3, prefix_caching=True)
    with started_engine("sglang", model, config, root / "engine") as engine:
        engine.ready(400)
        engine.serving(60)
        errors = engine.call("tests.workers.sglang_reload:reload", 400, **asked)
        with pytest.raises(EngineFailed) as mix:
            engine.call("tests.workers.sglang_reload:answer", 240, directory=str(root), step="mix")
    return errors, mix.value


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


def test_a_part_that_comes_too_late_is_refused(outcome):
    assert "wrongly shaped" in outcome["errors"]["late"]


@pytest.mark.only("vllm")
@pytest.mark.parametrize(
    ("step", "words"),
    [("after late", "start again"), ("after part", "layers.3.self_attn.qkv_proj"), ("after draft late", "mtp")],
)
def test_a_mix_of_old_and_new_weights_is_an_error(outcome, step, words):
    error = outcome["errors"][step]
    assert "update is incomplete" in error and words in error


@pytest.mark.only("vllm")
def test_draft_serves_again_after_a_whole_update(outcome):
    assert "wrongly shaped" in outcome["errors"]["draft late"]
    assert not outcome["errors"]["draft recovered"]


@pytest.mark.only("sglang")
def test_a_mix_of_old_and_new_weights_ends_the_server(outcome):
    assert "mix.short" not in outcome["answers"]
    log = outcome["mix"].log.read_text()
    assert "update is incomplete" in log
    # Where SGLang's runner chooses between the model and its graph.
    assert "_forward_raw" not in log


@pytest.mark.only("vllm")
@pytest.mark.parametrize("step", ["fresh", "megabytes", "kilobytes", "direct", "transfer"])
def test_draft_is_the_one_loaded_last(outcome, directories, step):
    difference = compare_draft(outcome["answers"][f"{step}.draft_logits"], directories[STEPS[step]])
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
