"""What is known of a checkpoint before a weight is read, wherever it is and however an engine loads it."""

import json
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import MODELOPT_FILE, Checkpoint, read_checkpoint, read_served
from qnext_plugin.cli import main
from qnext_plugin.config import QNextConfig
from tests.support import directories, fake_hub
from tests.support.fake_hub import COMMIT, NAME

SAFETENSORS = ("auto", "safetensors", "dummy", "fastsafetensors", "instanttensor", "runai_streamer", "a-plugin's")
OTHER = ("pt", "npcache", "sharded_state", "runai_streamer_sharded", "gguf")
NOTHING = Checkpoint({}, None, None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "source"
    write_random_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def local(source):
    quantize_checkpoint(source, source.with_name("fp8-block"), format="fp8-block")
    return source.with_name("fp8-block")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache, *files):
    repository = cache / "models--someone--a-model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in files:
        shutil.copy(file, snapshot)
    return snapshot


@pytest.mark.parametrize("load_format", [*SAFETENSORS, *OTHER])
def test_headers_are_read_for_every_load_format_that_reads_safetensors(local, hub, load_format):
    cached(hub, local / "config.json", local / SINGLE_FILE)
    expected = {name: (info.shape, info.dtype) for name, info in read_headers(local).items()}
    for model in (str(local), NAME):
        found = read_served(model, None, load_format, None).headers
        assert (found is None) == (load_format in OTHER)
        assert found is None or {name: (info.shape, info.dtype) for name, info in found.items()} == expected


def test_a_hub_name_is_read_from_the_cache_without_a_network(local, hub):
    cached(hub, local / "config.json", local / SINGLE_FILE)
    found = read_served(NAME, None, "auto", None)
    assert found.quantization == json.loads((local / "config.json").read_text())["quantization_config"]
    assert found.quantized is not None
    assert found.quantized.keys() == read_checkpoint(NAME).quantized.keys()
    assert read_served(NAME, COMMIT, "auto", None).headers is not None


def test_weights_may_be_in_a_cache_of_their_own(local, hub, tmp_path):
    cached(hub, local / "config.json")
    cached(tmp_path / "downloads", local / SINGLE_FILE)
    assert read_served(NAME, None, "auto", None).headers is None
    assert read_served(NAME, None, "auto", str(tmp_path / "downloads")).headers is not None


def test_an_incomplete_download_has_no_headers_but_a_quantization(local, hub):
    snapshot = cached(hub, local / "config.json")
    (snapshot / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": "absent.safetensors"}}))
    found = read_served(NAME, None, "auto", None)
    assert found.headers is None and found.quantized is None


def test_a_hub_that_cannot_be_asked_leaves_the_configuration(local, hub, monkeypatch):
    cached(hub, local / "config.json")
    for error in HfHubHTTPError.__bases__:
        monkeypatch.setattr("qnext_plugin.checkpoint.hub._ask", Mock(side_effect=error("no network")))
        assert read_served(NAME, None, "auto", None).headers is None
        assert read_checkpoint(NAME).quantization["quant_method"] == "fp8"


def test_what_is_no_checkpoint_is_left_to_the_engine(hub):
    for model in (NAME, "s3://bucket/a/model"):
        assert read_served(model, None, "auto", None) == NOTHING
    with pytest.raises(OSError, match="is not in the hub's cache; is there a network"):
        read_checkpoint(NAME)


@pytest.mark.parametrize("name", directories.SERVED)
def test_a_directory_without_a_right_index_is_served(source, tmp_path, name):
    """With drafts too where the engines load them, and otherwise the error says what to do."""
    model = str(directories.write(source, tmp_path / "model", directories.SERVED[name]))
    checkpoint, config = read_served(model, None, "auto", None), QNextConfig.from_pretrained(source)
    checkpoint.check(config)
    if name in directories.WITH_DRAFT:
        checkpoint.check(config, "required")
        assert checkpoint.headers.keys() == read_headers(source).keys()
        return
    with pytest.raises(ValueError) as refused:
        checkpoint.check(config, "required")
    if checkpoint.unread:
        assert str(refused.value) == (
            f"the rest of this checkpoint is in {directories.M}, which {INDEX_FILE} does not name, and the engines "
            f"load only what it names; write a new index: qnext checkpoint index {model}"
        )
        assert main(["checkpoint", "index", model]) == 0
        read_checkpoint(model).check(config, "required")


@pytest.mark.parametrize(("name", "advice"), [*zip(directories.REFUSED, ["index"] * 2 + ["stale"] * 2, strict=True)])
def test_an_ambiguous_directory_is_refused(source, tmp_path, name, advice):
    model = str(directories.write(source, tmp_path / "model", directories.REFUSED[name]))
    with pytest.raises(ValueError, match=f"^{model}: ") as refused:
        read_served(model, None, "auto", None)
    assert str(refused.value).endswith(advice if advice == "stale" else f"index {model}")
    with pytest.raises(ValueError, match=f"^{re.escape(str(refused.value))}$"):
        read_checkpoint(model)


def test_a_file_that_does_not_belong_there_is_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "model" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"files with unexpected tensors: 1: adapter_model\.safetensors\n.* move"):
        read_checkpoint(str(tmp_path / "model")).check(QNextConfig.from_pretrained(source))


BITS = {"group_size": 64, "bits": 4}
KINDS = {
    "a GGUF checkpoint": ({}, "model-Q4_K_M.gguf"),
    "a checkpoint in .pth files": ({}, "consolidated.00.pth"),
    "an MLX checkpoint": ({"quantization": BITS, "quantization_config": BITS | {"mode": "affine"}}, SINGLE_FILE),
    "quantized with bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, SINGLE_FILE),
}


@pytest.mark.parametrize("found", KINDS)
def test_what_is_made_for_other_programs_is_refused_by_name(source, hub, tmp_path, found):
    """A directory, and a name on the hub."""
    added, file = KINDS[found]
    (tmp_path / "model").mkdir()
    raw = json.loads((source / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw | added))
    shutil.copy(source / SINGLE_FILE, tmp_path / "model" / file)
    cached(hub, tmp_path / "model" / "config.json", tmp_path / "model" / file)
    for model in (str(tmp_path / "model"), NAME):
        with pytest.raises(ValueError, match=f"^{model}: {found}.*; take one of the same model in safetensors files"):
            read_served(model, None, "auto", None)
        with pytest.raises(ValueError, match=f"^{model}: {found}"):
            read_checkpoint(model)


def test_experts_stacked_by_mlx_are_refused_by_name(source, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(source / "config.json", tmp_path / "model")
    save_file({"model.layers.0.mlp.switch_mlp.up_proj.weight": torch.zeros(2)}, tmp_path / "model" / SINGLE_FILE)
    with pytest.raises(ValueError, match="an MLX checkpoint"):
        read_checkpoint(str(tmp_path / "model"))


@pytest.mark.parametrize("model", ["/models/model-Q4_K_M.gguf", "someone/a-model-GGUF:UD-Q4_K_XL"])
def test_names_of_gguf_files_are_refused_by_name(hub, model):
    for read in (read_checkpoint, lambda model: read_served(model, None, "auto", None)):
        with pytest.raises(ValueError, match=f"^{model}: a GGUF checkpoint"):
            read(model)


def test_a_checkpoint_that_was_written_over_is_read_again(local, tmp_path):
    shutil.copytree(local, tmp_path / "served")
    before = read_served(str(tmp_path / "served"), None, "auto", None)
    tensors = load_file(local / SINGLE_FILE)
    tensors["added"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "served" / SINGLE_FILE)
    after = read_served(str(tmp_path / "served"), None, "auto", None)
    assert after.headers.keys() - before.headers.keys() == {"added"}
    config = QNextConfig.from_pretrained(local)
    before.check(config)
    with pytest.raises(ValueError, match="unexpected 1: added"):
        after.check(config)


def test_modelopt_says_it_in_a_file_of_its_own(local, hub, tmp_path):
    raw = json.loads((local / "config.json").read_text())
    del raw["quantization_config"]
    shutil.copytree(local, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model" / MODELOPT_FILE).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    cached(hub, *(tmp_path / "model" / name for name in ("config.json", SINGLE_FILE, MODELOPT_FILE)))
    for model in (str(tmp_path / "model"), NAME):
        assert read_served(model, None, "auto", None).quantized is not None


def test_new_weights_may_come_without_a_configuration(local, tmp_path):
    (tmp_path / "weights").mkdir()
    shutil.copy(local / SINGLE_FILE, tmp_path / "weights")
    found = read_served(str(tmp_path / "weights"), None, "auto", None)
    assert found.headers is not None and found.quantization is None
    with pytest.raises(ValueError, match=r"not a readable config\.json"):
        read_checkpoint(str(tmp_path / "weights"))


READ = f"""
import json
from qnext_plugin.checkpoint.stored import read_served
for _ in range(2):
    found = read_served({NAME!r}, None, "auto", None)
    headers = {{name: [info.shape, info.dtype, info.file.name] for name, info in found.headers.items()}}
    print(json.dumps([found.quantization["quant_method"], headers]))
"""


@pytest.mark.parametrize("layout", ["shards", "shards without an index"])
def test_the_hub_is_asked_for_headers_once_for_all_ranks(local, tmp_path, layout):
    """And each header once, where the hub's cache has none of the weights yet."""
    parts, _ = directories.WITH_DRAFT["shards without an index"]
    index = {part: file for file, names in parts.items() for part in names.split()} if layout == "shards" else None
    directory = directories.write(local, tmp_path / "model", (parts, index))
    with fake_hub.started(directory) as hub:
        env = hub.environment(tmp_path / "home")
        ranks = [
            subprocess.Popen([sys.executable, "-c", READ], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        answers = {line for rank in ranks for line in rank.communicate()[0].splitlines()}
    expected = {name: [list(info.shape), info.dtype, info.file.name] for name, info in read_headers(directory).items()}
    assert [json.loads(answer) for answer in answers] == [["fp8", expected]]
    ranges = {key: count for key, count in hub.asked.items() if key[1] == "range"}
    assert ranges == {("GET", "range", file): 1 for file in parts}
    assert sum(count for (method, _, name), count in hub.asked.items() if name == INDEX_FILE and method == "GET") <= 1


def test_a_gguf_repository_without_a_configuration_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-Q4_K_M.gguf").touch()
    with fake_hub.started(tmp_path / "model") as hub:
        env = hub.environment(tmp_path / "home")
        command = "import sys; from qnext_plugin.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", command, "plan", NAME], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"{NAME}: a GGUF checkpoint" in done.stderr


@pytest.mark.parametrize("engine", ["VLLM", "SGLANG"])
def test_a_name_on_modelscope_is_not_looked_up_on_the_hub(local, hub, monkeypatch, engine):
    cached(hub, local / "config.json", local / SINGLE_FILE)
    monkeypatch.setenv(f"{engine}_USE_MODELSCOPE", "True")
    assert read_served(NAME, None, "auto", None) == NOTHING
    with pytest.raises(ValueError, match=f"{NAME}: not in ModelScope's cache"):
        read_checkpoint(NAME)
    assert read_served(str(local), None, "auto", None).headers is not None
