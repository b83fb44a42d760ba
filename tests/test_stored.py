"""What is known of a checkpoint before a weight is read, wherever it is and however an engine loads it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import MODELOPT_FILE, Checkpoint, read_checkpoint, read_served
from qnext_plugin.config import QNextConfig

NAME, COMMIT = "someone/a-model", "0" * 40
SAFETENSORS = ("auto", "safetensors", "dummy", "fastsafetensors", "instanttensor", "runai_streamer", "a-plugin's")
OTHER = ("pt", "npcache", "sharded_state", "gguf")
NOTHING = Checkpoint({}, None, None)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(root / "source")
    quantize_checkpoint(root / "source", root / "fp8-block", format="fp8-block")
    return root / "fp8-block"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
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


def test_what_is_no_checkpoint_is_left_to_the_engine(hub, tmp_path):
    (tmp_path / "model.gguf").touch()
    for model in (NAME, "s3://bucket/a/model", str(tmp_path / "model.gguf")):
        assert read_served(model, None, "auto", None) == NOTHING
    with pytest.raises(OSError, match="is not in the hub's cache; is there a network"):
        read_checkpoint(NAME)


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
