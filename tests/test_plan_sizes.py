"""What `qnext plan` counts: known figures of the 80B model, and the arithmetic on odd sizes."""

from dataclasses import replace

import pytest
import torch

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_random import PRESETS, write_random_checkpoint
from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.config import QNextConfig
from qnext_plugin.plan.caches import DEVICES, Device, SglangCache, VllmCache
from qnext_plugin.plan.cpu import Decoding
from qnext_plugin.plan.sizes import Serving
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


def test_a_draft_of_another_width_is_counted(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "wide-draft")
    found = read_checkpoint(str(checkpoint))
    config = found.complete(QNextConfig.from_dict(found.config))
    wide = Serving(config, num_draft_tokens=2)
    assert config.draft.num_experts == WIDE > config.num_experts
    assert wide.weights(found.headers) == wide.weights()
    narrow = Serving(replace(config, mtp_num_experts=None), num_draft_tokens=2).weights()
    assert narrow["MTP draft"] < wide.weights()["MTP draft"]


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
