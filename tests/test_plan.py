"""`qnext plan`: what it prints and refuses, and where the metadata comes from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_random import PRESETS, write_random_checkpoint
from qnext_plugin.cli import main
from qnext_plugin.config import QNextConfig
from qnext_plugin.ops import instructions
from qnext_plugin.plan.sizes import Serving
from tests.support import fake_hub

GIB = 2**30
CONFIG_80B = QNextConfig.from_dict(PRESETS["80b"])


# Command line


def plan(capsys, *arguments: str) -> tuple[int, dict]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def published(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["80b"] | {"torch_dtype": "bfloat16"}))
    return str(tmp_path)


def test_command_lines_and_numbers(capsys, published):
    status, found = plan(capsys, published, "--tensor-parallel-size", "4", "--mtp", "2")
    assert status == 0
    assert sum(found["weights"].values()) / GIB == pytest.approx(38, rel=0.01)
    vllm, sglang = found["engines"]["vllm"], found["engines"]["sglang"]
    assert "--tensor-parallel-size 4 --max-model-len 262144" in vllm["command"]
    assert '"num_speculative_tokens":2' in vllm["command"]
    assert "--tp-size 4" in sglang["command"] and "--speculative-num-draft-tokens 3" in sglang["command"]
    assert list(vllm["concurrency"]) == ["1024", "4096", "16384", "65536", "262144"]
    for engine in (vllm, sglang):
        falling = list(engine["concurrency"].values())
        assert falling == sorted(falling, reverse=True) and falling[-1] >= 1


@pytest.mark.parametrize(
    ("arguments", "vllm", "sglang"),
    [
        ([], 12_288, 12_288),
        (["--kv-cache-dtype", "bfloat16"], 24_576, 24_576),
        (["--kv-cache-dtype", "fp8"], 12_288, 12_288),
        (["--device", "cpu"], 12_288 if torch.cpu._is_avx512_supported() else 24_576, 24_576),
    ],
)
def test_keys_and_values_are_as_the_checkpoint_asks_unless_a_flag_says_otherwise(
    capsys, published, arguments, vllm, sglang
):
    asking = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    Path(published, "hf_quant_config.json").write_text(json.dumps(asking))
    _, found = plan(capsys, published, "--cache-memory", "30", *arguments)
    for engine, expected in (("vllm", vllm), ("sglang", sglang)):
        assert found["engines"][engine]["kv_bytes_per_token"] == expected
        assert ("--kv-cache-dtype" in found["engines"][engine]["command"]) == ("--kv-cache-dtype" in arguments)


def test_refused_sequences_and_lengths_are_named(capsys, published):
    _, found = plan(capsys, published, "--tensor-parallel-size", "4", "--cache-memory", "2")
    vllm = found["engines"]["vllm"]
    assert vllm["max_num_seqs_refused"] and vllm["num_blocks"] < 1024
    assert f"--max-num-seqs {vllm['num_blocks']}" in vllm["command"]
    main(["plan", published, "--tensor-parallel-size", "4", "--cache-memory", "2"])
    text = capsys.readouterr().out
    assert f"--max-num-seqs 1024, its default, is refused: at most {vllm['num_blocks']}" in text
    status = main(["plan", published, "--cache-memory", "1"])
    text = capsys.readouterr().out
    assert status == 1 and "--max-model-len 262144 is refused: at most" in text


def test_weights_that_do_not_fit(capsys, published):
    assert main(["plan", published, "--gpu-memory", "80"]) == 1
    assert "the weights do not fit" in capsys.readouterr().out


def test_an_engine_that_fits_may_be_asked_for_alone(capsys, published):
    arguments = (published, "--cache-memory", "6.4")
    for engine, status in (("vllm", 0), ("sglang", 1)):
        found, numbers = plan(capsys, *arguments, "--engine", engine)
        assert (found, list(numbers["engines"])) == (status, [engine])
        assert main(["plan", *arguments, "--engine", engine]) == status
        other = {"vllm": "SGLang", "sglang": "vLLM"}[engine]
        assert other not in capsys.readouterr().out
    assert main(["plan", *arguments]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mtp", "9"], "--mtp is 9, expected 0 to 7"),
        (["--context-length", "0"], "--context-length is 0, expected more than 0"),
        (["--tensor-parallel-size", "3"], "does not divide linear_num_key_heads"),
    ],
)
def test_mistakes_are_one_line(capsys, published, arguments, words):
    assert main(["plan", published, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_a_start_refuses_does_not_fit(capsys, tmp_path):
    write_random_checkpoint(tmp_path / "model", overrides={"num_hidden_layers": 4})
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(trunk, file)
    fits = [str(tmp_path / "model"), "--device", "cpu", "--cache-memory", "1"]
    assert main(["plan", *fits]) == 0
    assert main(["plan", *fits, "--mtp", "2"]) == 2
    assert "the checkpoint has no mtp.* tensors" in capsys.readouterr().err
    router = "model.layers.2.mlp.gate.weight"
    save_file(trunk | {router: trunk[router][:5].clone()}, file)
    assert main(["plan", *fits]) == 2
    assert "the number of experts differs between layers" in capsys.readouterr().err


def test_neither_a_directory_nor_a_name(capsys):
    assert main(["plan", "no-such-directory"]) == 2
    assert "neither a local directory nor a name on the hub" in capsys.readouterr().err


# CPUs


def test_a_machine_without_gpus(capsys, published):
    arguments = ["--device", "cpu", "--memory", "256", "--memory-bandwidth", "50", "--context-length", "32768"]
    status, found = plan(capsys, published, *arguments, "--mtp", "2")
    cpu, vllm, sglang = found["cpu"], found["engines"]["vllm"], found["engines"]["sglang"]
    assert status == 0 and cpu["advice"] == []
    for engine in (vllm, sglang):
        assert engine["cache_memory"] == 252 * GIB - sum(found["weights"].values())
    assert f"--kv-cache-memory-bytes {vllm['cache_memory']}" in vllm["command"]
    assert f"--max-total-tokens {sglang['num_tokens']}" in sglang["command"]
    assert f"--max-mamba-cache-size {sglang['num_slots']} " in sglang["command"]
    assert "memory-utilization" not in vllm["command"] and "mem-fraction" not in sglang["command"]
    steps = {(step["drafts"], step["sequences"]): step for step in cpu["decoding"]}
    assert steps.keys() == {(drafts, sequences) for drafts in (0, 2) for sequences in (1, 4, 8)}
    for (drafts, sequences), step in steps.items():
        slowest = sequences * 50e9 / step["bytes"]
        assert step["tokens_per_second"] == pytest.approx([slowest, 3 * slowest] if drafts else [slowest])


def test_a_machine_that_is_too_small_for_loading_or_for_the_context(capsys, published):
    weights = sum(Serving(CONFIG_80B).weights().values()) / GIB
    layer = 512 * 3 * 512 * 2048 * 2 / GIB
    arguments = [published, "--device", "cpu", "--context-length", "1024", "--reserve", "1", "--memory"]
    assert main(["plan", *arguments, str(weights + 1 + layer + 0.1)]) == 0
    assert "To make it fit" not in capsys.readouterr().out
    status, found = plan(capsys, *arguments, str(weights + 1 + layer - 0.1))
    assert status == 1 and found["cpu"]["advice"] == ["a machine with 192 GiB"]
    assert found["engines"]["vllm"]["concurrency"]["1024"] >= 1
    assert main(["plan", published, "--device", "cpu", "--memory", str(weights + 8)]) == 1
    text = capsys.readouterr().out
    assert "To make it fit\n  --context-length 65536\n  a machine with 192 GiB\n" in text


@pytest.mark.parametrize("form", ["w4a16", "fp8-block", "awq", "nvfp4"])
def test_a_quantized_checkpoint_is_counted_as_a_cpu_holds_it(capsys, tmp_path, monkeypatch, form):
    overrides = {"num_hidden_layers": 4, "moe_intermediate_size": 128, "hidden_size": 256}
    write_random_checkpoint(tmp_path / "model", format=form, overrides=overrides)
    arguments = str(tmp_path / "model"), "--device", "cpu"
    plain = Serving(QNextConfig.from_pretrained(tmp_path / "model")).weights()
    monkeypatch.setattr(instructions, "multiplies_codes", lambda: False)
    _, found = plan(capsys, *arguments)
    assert found["weights"] == plain and found["cpu"]["stored"] < 0.7 * sum(plain.values())
    monkeypatch.setattr(instructions, "multiplies_codes", lambda: True)
    _, found = plan(capsys, *arguments)
    assert 0.95 < sum(found["weights"].values()) / found["cpu"]["stored"] < 1.05
    _, found = plan(capsys, *arguments, "--dtype", "float32")
    assert found["weights"]["experts"] == 2 * plain["experts"]


# The hub: a stand-in that answers as huggingface.co does, and counts


def test_hub_name_fetches_metadata_only(tmp_path):
    model = tmp_path / "model"
    write_random_checkpoint(model, overrides={"num_experts": 16, "vocab_size": 4000})
    command = "import sys; from qnext_plugin.cli import main; sys.exit(main())"
    with fake_hub.started(model) as hub:
        done = subprocess.run(
            [sys.executable, "-c", command, "plan", fake_hub.NAME, "--json"],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights_from"] == "safetensors headers"
    local = Serving(QNextConfig.from_pretrained(model)).weights(read_headers(model))
    assert found["weights"] == local
    assert 0 < hub.sent < (model / "model.safetensors").stat().st_size / 2
