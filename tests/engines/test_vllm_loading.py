"""Every rank of tensor-parallel groups of up to eight holds its part of the checkpoint, plain or quantized.

A reload changes all of it.
"""

from functools import cache

import pytest

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantizers import FORMATS
from tests.support.adapters import write_adapter
from tests.support.checkpoints import CHECKPOINTS
from tests.support.groups import group_of, in_groups
from tests.support.reads import check_reads
from tests.support.shards import make, make_auto_round
from tests.support.workers import call
from tests.workers.vllm_loading import READ, WAYS, WORDS

TARGET = "Qwen3NextForCausalLM"
SHARED = "model.layers.0.mlp.shared_expert"
WITHOUT_KERNEL = ("nvfp4", "nvfp4-llm-compressor", "mxfp8", "mxfp4", "mxfp4-quark", "gptq-int8")  # of vLLM's on a CPU
LAYERS = {
    "model.layers.0.linear_attn.in_proj_qkvz",
    "model.layers.0.linear_attn.out_proj",
    "model.layers.1.self_attn.qkv_proj",
    "model.layers.1.self_attn.o_proj",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, warm):
    """By checkpoint and rank, the layers that hold their weights as stored; every parameter has been compared."""

    @cache
    def group(names):
        root = tmp_path_factory.mktemp("loading")
        make(root, names)
        if "gptq" in names:
            make_auto_round(root)
        if "plain" in names:
            every_linear = r"model\..*\.(linear_attn|self_attn|mlp|shared_expert)\.\w+"
            write_adapter(root / "adapter", root / "plain", every_linear, rank=5, alpha=7)
        with warm.forking():
            return call("vllm_loading:check", root.with_name(f"{root.name}-worker"), timeout=1800, root=str(root))

    return lambda name: group(group_of(name))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_reads_no_expert_of_another(loaded, name, way):
    """And what it holds of its own, some twice where the load balancer wants spare ones, has been compared."""
    assert len(loaded(name)[f"read {name}"][way]["experts"]) == {"TP 2": 8, "EP 2": 4, "EP 2, balanced": 6}[way]
    check_reads(loaded(name)[f"read {name}"][way], split=way == "TP 2" and name == "plain")


def test_each_rank_holds_its_shard_of_a_plain_checkpoint_and_of_an_adapter(loaded):
    assert len(loaded("plain")["plain"]) == 1 + 2 + 4 + 8
    assert not any(loaded("plain")["plain"].values())


@pytest.mark.parametrize("name", in_groups(FORMATS))
def test_each_rank_holds_its_shard_of_a_quantized_checkpoint(loaded, record_property, name):
    assert len(loaded(name)[name]) == 1 + 2 + 4 + 8
    for rank, as_stored in loaded(name)[name].items():
        layers = {layer.split(".", 1)[1].removesuffix(".weight") for layer in as_stored if TARGET in layer}
        if name not in WITHOUT_KERNEL:
            assert layers >= LAYERS, rank
        # FP8 blocks of 128 rows, of which a rank of 8 would hold 64.
        whole = (name, rank.split()[-1]) != ("fp8-block", "8") and name not in WITHOUT_KERNEL
        assert (f"{SHARED}.gate_up_proj" in layers) == (f"{SHARED}.down_proj" in layers) == whole, rank
    how = "dequantized parameters match" if name in WITHOUT_KERNEL else "parameters match"
    record_property("matrix", f"{name} | vLLM | TP 1, 2, 4, 8 | {how}")


@pytest.mark.parametrize("name", in_groups(FORMATS))
def test_each_rank_holds_its_shard_in_codes_where_compiled_products_take_them(loaded, name):
    """Of every format every layer, also those whose blocks are wider than a rank's part; compared when loaded."""
    assert len(loaded(name)[f"{name}, codes"]) == 2
    for rank, held in loaded(name)[f"{name}, codes"].items():
        layers = {layer.split(".", 1)[1].removesuffix("weight").rstrip("._") for layer in held if TARGET in layer}
        shared = {f"{SHARED}.gate_up_proj", f"{SHARED}.down_proj"}
        assert layers >= LAYERS | shared | {f"model.layers.0.mlp.experts.routed_experts.{w}" for w in ("w13", "w2")}, (
            rank
        )


@pytest.mark.parametrize("name", in_groups(FORMATS))
def test_what_is_quantized_is_what_the_headers_say(loaded, name):
    """Not the exclude lists, which match nothing here; `k_proj`, the draft's experts and more are bfloat16."""
    assert len(loaded(name)[f"{name}-mixed"]) == 1 + 2 + 4 + 8
    for rank, as_stored in loaded(name)[f"{name}-mixed"].items():
        assert "Qwen3NextForCausalLM.model.layers.1.self_attn.qkv_proj.weight" not in as_stored, rank
        assert not any("Qwen3NextMTP" in layer and "experts" in layer for layer in as_stored), rank
        if rank == "0 of 1" and name not in WITHOUT_KERNEL:
            assert "Qwen3NextMTP.model.fc.weight" in as_stored
            assert "Qwen3NextForCausalLM.model.layers.0.linear_attn.out_proj.weight" in as_stored


@pytest.mark.parametrize("name", in_groups(WORDS))
def test_four_bits_are_dequantized_where_vllm_lacks_the_operator(loaded, name):
    """CPUs with AVX2 only, where vLLM's kernel says that it can be used and fails at the first request."""
    assert loaded(name)[f"{name}, AVX2"] == {"1 of 2": []}


@pytest.mark.parametrize("name", in_groups(["fp8-channel", "nvfp4"]))
def test_keys_and_values_are_plain_where_the_cpu_has_no_fp8_cache(loaded, name):
    """The checkpoint asks for FP8, in the words of two quantizers."""
    found = loaded(name)[f"{name}, no FP8 cache"]
    assert found["layers"] == ["auto"]
    notes = [what for what, _ in found["risks"] if "not in FP8 as the checkpoint asks" in what]
    assert len(notes) == 1 and notes[0].endswith("FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
    assert "--kv-cache-dtype fp8_e5m2 found, expected auto or bfloat16 on this CPU: FP8 KV" in found["refused"]


def test_what_a_configuration_leaves_out_is_served_as_stored(loaded):
    """AutoRound's names the model's layers; the draft's are quantized all the same."""
    for rank, as_stored in loaded("gptq")["auto-round"].items():
        layers = {layer.split(".", 1)[1].removesuffix(".weight") for layer in as_stored if TARGET in layer}
        assert layers >= LAYERS, rank
        assert any("Qwen3NextMTP" in layer for layer in as_stored), rank


def test_what_is_derived_from_weights_follows_them(tmp_path, checkpoint):
    """Packed experts, convolutions and linears, and a tied head."""
    names, pairs = ("tiny", "odd-b", "bfloat16"), []
    for name in names:
        dtype = "bfloat16" if name == "bfloat16" else "float32"
        write_random_checkpoint(tmp_path / name, dtype=dtype, seed=7, overrides=CHECKPOINTS[name])
        pairs.append((str(checkpoint(name)), str(tmp_path / name)))
    assert call("vllm_modules:check", tmp_path / "worker", pairs=pairs) == len(names)
