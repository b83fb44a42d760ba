"""What a user can get wrong: one clear error that names what was found and what to do, before anything is served."""

import json

import pytest
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines import process
from qnext_plugin.engines.config import mtp_flags
from qnext_plugin.engines.server import command

SMALL = {"num_hidden_layers": 4, "num_experts": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
A_LOG = "model.layers.0.linear_attn.A_log"


def truncated(directory):
    file = directory / "model.safetensors"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


def tensor_missing(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors[A_LOG]
    save_file(tensors, file, metadata={"format": "pt"})


def inconsistent_heads(directory):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"linear_num_value_heads": 3}))


def draft_missing(directory):
    file = directory / "model.safetensors"
    trunk = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("mtp.")}
    save_file(trunk, file, metadata={"format": "pt"})
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 0}))


def nothing(directory):
    pass


# Those that the scheduler process finds take a start of half a minute each, so what the headers say has two examples;
# tests/test_checkpoint.py has the rest.
CASES = [
    pytest.param(truncated, [], ["model.safetensors: truncated", "download it again"], id="truncated"),
    pytest.param(tensor_missing, [], ["missing", A_LOG], id="missing"),
    pytest.param(
        inconsistent_heads, [], ["linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"], id="heads"
    ),
    pytest.param(
        nothing,
        ["--tp-size", "3"],
        ["tensor parallel size 3 does not divide linear_num_key_heads 2; choose one of [1, 2]"],
        id="tensor-parallel",
    ),
    pytest.param(
        draft_missing,
        mtp_flags("sglang", 1),
        ["drafts are requested, and the checkpoint has no mtp.* tensors", "drop the flags"],
        id="draft-missing",
    ),
    pytest.param(
        nothing,
        ["--quantization", "fp8"],
        ["--quantization fp8 found, and the checkpoint is not quantized", "drop the flag"],
        id="online-quantization",
    ),
    pytest.param(
        nothing,
        ["--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1"],
        ["--speculative-ngram-max-bfs-breadth 1 found, expected 2 or more"],
        id="another-draft",
    ),
]


@pytest.mark.parametrize(("edit", "options", "words"), CASES)
def test_server_exits_with_the_reason(tmp_path, warm, edit, options, words):
    directory, log = tmp_path / "checkpoint", tmp_path / "log"
    write_random_checkpoint(directory, dtype="float32", overrides=SMALL)
    edit(directory)
    flags = ["--dtype", "float32", *options]
    with warm.forking():
        assert process.run(command("sglang", str(directory), process.free_port(), flags), log) != 0
    text = log.read_text()
    for word in words:
        assert word in text, process.tail(log)
    assert "The server is fired up" not in text
