"""`qnext plan`: known figures of the 80B model, the arithmetic on odd sizes, and where the metadata comes from."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_random import PRESETS, write_random_checkpoint
from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.cli import main
from qnext_plugin.config import QNextConfig
from qnext_plugin.ops import instructions
from qnext_plugin.plan.caches import DEVICES, Device, SglangCache, VllmCache
from qnext_plugin.plan.cpu import Decoding
from qnext_plugin.plan.sizes import Serving
from tests.support import fake_hub
from tests.support.checkpoints import WIDE, write_checkpoint

GIB = 2**30
CONFIG_80B = QNextConfig.from_dict(PRESETS["80b"])
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 333, "num_hidden_layers": 5}


def serving(**changes) -> Serving:
    return Serving(CONFIG_80B, **changes)


def test_known_figures_of_the_80b():
    plain = serving()
    assert plain.kv_bytes_per_token == 24_576
    state = plain.state(torch.bfloat16, torch.float32).page_bytes * plain.num_gdn_layers
    assert state == 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    assert sum(plain.weights().values()) == pytest.approx(160e9, rel=0.01)
    assert serving(num_draft_tokens=2).kv_bytes_per_token == 24_576 * 13 // 12


@pytest.mark.parametrize(
    ("tp_size", "kv_bytes_per_token"), [(1, 24_576), (2, 12_288), (4, 12_288), (8, 12_288), (16, 12_288)]
)
def test_key_value_heads_are_repeated_where_there_are_more_ranks(tp_size, kv_bytes_per_token):
    assert serving(tp_size=tp_size).kv_bytes_per_token == kv_bytes_per_token


def test_tensor_parallel_size_that_does_not_split_the_heads():
    with pytest.raises(ValueError, match="tensor parallel size 3 does not divide linear_num_key_heads 16"):
        serving(tp_size=3)


def test_ranks_share_what_is_split_and_repeat_the_rest():
    whole, half, quarter = (serving(tp_size=n).weights() for n in (1, 2, 4))
    for kind in ("experts", "shared experts", "embedding and head"):
        assert half[kind] == whole[kind] / 2
    assert half["routers and norms"] == whole["routers and norms"]
    assert whole["gated attention"] / 2 < 2 * quarter["gated attention"] < half["gated attention"] * 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_headers_and_config_agree_on_odd_sizes(tmp_path, dtype):
    write_random_checkpoint(tmp_path / "odd", dtype=dtype, overrides=ODD)
    config = QNextConfig.from_pretrained(tmp_path / "odd")
    for drafts in (0, 3):
        odd = Serving(config, num_draft_tokens=drafts, dtype=getattr(torch, dtype))
        assert odd.weights(read_headers(tmp_path / "odd")) == odd.weights()
    file_size = (tmp_path / "odd" / "model.safetensors").stat().st_size
    padding = 2 * (384 - 333) * config.hidden_size * odd.dtype.itemsize
    assert sum(odd.weights().values()) - padding == pytest.approx(file_size, rel=0.03)  # the rest is the header


@pytest.mark.parametrize(
    ("state_dtype", "drafts", "block_size", "state_blocks"),
    [
        (torch.bfloat16, 0, 576, 3 * 3),
        (torch.float32, 0, 1088, 3 * 3),
        (torch.bfloat16, 2, 576, 3 * 5),
    ],
)
def test_vllm_blocks_of_the_80b_on_a_gpu(state_dtype, drafts, block_size, state_blocks):
    cache = VllmCache(serving(num_draft_tokens=drafts), state_dtype)
    older = VllmCache(serving(num_draft_tokens=drafts), state_dtype, Device(16, 16))
    assert older.block_size == {576: 560 if drafts else 544, 1088: 1056}[block_size]
    assert older.state_blocks == state_blocks - 3
    assert (cache.block_size, cache.state_blocks) == (block_size, state_blocks)
    layers = 13 if drafts else 12
    assert cache.block_bytes == layers * block_size * 2048
    assert cache.blocks(block_size + 1) == state_blocks + 2
    memory = 20 * GIB
    assert cache.concurrency(memory, 1000) == cache.num_blocks(memory) / cache.blocks(1000)
    longest = cache.longest(memory)
    assert cache.concurrency(memory, longest) >= 1 > cache.concurrency(memory, longest + 1)


def test_vllm_blocks_follow_what_the_user_and_the_device_ask_for():
    plain = VllmCache(serving(), torch.bfloat16, DEVICES["cpu"])
    assert plain.block_size == 640
    assert VllmCache(serving(), torch.bfloat16, DEVICES["cpu"], user_block_size=32).block_size == 544
    assert VllmCache(serving(), torch.bfloat16, user_block_size=4096).block_size == 4096
    assert VllmCache(serving(), torch.bfloat16, prefix_caching=False).state_blocks == 3


@pytest.mark.parametrize("drafts", [0, 2])
def test_sglang_pools_use_the_memory_and_no_more(drafts):
    cache, memory = SglangCache(serving(num_draft_tokens=drafts), torch.float32), 30 * GIB
    slots, tokens, requests = cache.num_slots(memory), cache.num_tokens(memory), cache.running_requests(memory)
    verifying = (requests + 1) * cache.verified_tokens
    used = (slots + 1 + verifying) * cache.state_bytes + tokens * cache.serving.kv_bytes_per_token
    assert memory - cache.serving.kv_bytes_per_token < used <= memory
    assert requests == slots // 5
    assert cache.concurrency(memory, 2) == requests


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


def test_a_draft_of_another_width_is_counted(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "wide-draft")
    found = read_checkpoint(str(checkpoint))
    config = found.complete(QNextConfig.from_dict(found.config))
    wide = Serving(config, num_draft_tokens=2)
    assert config.draft.num_experts == WIDE > config.num_experts
    assert wide.weights(found.headers) == wide.weights()
    narrow = Serving(replace(config, mtp_num_experts=None), num_draft_tokens=2).weights()
    assert narrow["MTP draft"] < wide.weights()["MTP draft"]


def test_neither_a_directory_nor_a_name(capsys):
    assert main(["plan", "no-such-directory"]) == 2
    assert "neither a local directory nor a name on the hub" in capsys.readouterr().err


# CPUs


def test_a_step_reads_each_weight_once_but_only_the_experts_that_are_routed_to():
    weights, experts = serving().weights(), serving().weights()["experts"]
    head = 2 * 151_936 * 2048
    dense = sum(weights.values()) - experts - head  # the other half of "embedding and head" is looked up
    plain = Decoding(serving(), None, state_bytes=0)
    assert plain.step(1) == pytest.approx(7.1e9, rel=0.01)
    for sequences in (1, 8):
        routed = 1 - (502 / 512) ** sequences
        assert plain.step(sequences) == pytest.approx(dense + experts * routed, rel=1e-6)
    drafts = serving(num_draft_tokens=2)
    draft = drafts.weights()["MTP draft"]
    routers_and_rest = draft - experts / 48
    expected = dense + 2 * head + experts * (1 - (502 / 512) ** 3) + 2 * (routers_and_rest + experts / 48 * 10 / 512)
    assert Decoding(drafts, None, state_bytes=0).step(1) == pytest.approx(expected, rel=1e-6)


def test_a_step_reads_caches_and_states_and_writes_states():
    plain, drafts = serving(), serving(num_draft_tokens=2)
    for one, states in ((plain, 2), (drafts, 4)):
        none, some = Decoding(one, None, 0), Decoding(one, None, 1000)
        assert some.step(4, 500) - none.step(4) == 4 * (states * 1000 + 500 * one.kv_bytes_per_token)
    tied = Serving(replace(CONFIG_80B, tie_word_embeddings=True))
    assert Decoding(tied, None, 0).step(1) == Decoding(plain, None, 0).step(1)
    halves = Decoding(serving(tp_size=2), None, 0)
    assert Decoding(plain, None, 0).step(1) < halves.step(1) < 1.05 * Decoding(plain, None, 0).step(1)


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
    weights = sum(serving().weights().values()) / GIB
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
