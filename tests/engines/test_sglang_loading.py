"""Every rank of tensor-parallel groups of up to eight holds its part of the checkpoint, plain or quantized."""

from functools import cache

import pytest

from qnext_plugin.checkpoint.quantizers import FORMATS
from tests.support.groups import group_of, in_groups
from tests.support.reads import check_reads
from tests.support.shards import OUTER_RANKS, RANKS, make
from tests.support.workers import call
from tests.workers.sglang_loading import READ, WAYS

TARGET, DRAFT = "Qwen3NextForCausalLM.model.", "Qwen3NextForCausalLMMTP.model."
SHARED = {f"{TARGET}layers.0.mlp.shared_expert.{name}.weight" for name in ("gate_up_proj", "down_proj")}
DEQUANTIZED_AT_8 = {
    "fp8-block": SHARED,  # blocks of 128, of which a rank would hold 64
    "awq": {name for name in SHARED if "down" in name},  # Marlin's least number of inputs is 128
}
LAYERS = {
    f"{TARGET}layers.0.linear_attn.in_proj_qkvz.weight",
    f"{TARGET}layers.0.linear_attn.out_proj.weight",
    f"{TARGET}layers.1.self_attn.qkv_proj.weight",
    f"{TARGET}layers.1.self_attn.o_proj.weight",
    f"{TARGET}layers.0.mlp.experts.routed_experts.w13_weight",
    f"{DRAFT}layers.0.self_attn.qkv_proj.weight",
    f"{DRAFT}layers.0.mlp.experts.routed_experts.w2_weight",
}
REFUSED_ON_GPU = {
    "w8a8": ("W8A8Int8 Fused MoE scheme is implemented only for NPU", "int8 experts"),
    "mxfp8": ("SGLang has no method for the MX formats of compressed-tensors", "this format"),
    "mxfp4": ("SGLang has no method for the MX formats of compressed-tensors", "this format"),
    "mxfp4-quark": ("SGLang has a method for the MXFP4 of Quark on AMD's GPUs only", "this format"),
}
ON_GPU = [name for name in FORMATS if name not in REFUSED_ON_GPU]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, warm):
    """By checkpoint and rank, the layers that hold their weights as stored; every parameter has been compared."""

    @cache
    def group(names):
        root = tmp_path_factory.mktemp("loading")
        make(root, names)
        with warm.forking():
            return call("sglang_loading:check", root.with_name(f"{root.name}-worker"), timeout=1800, root=str(root))

    return lambda name: group(group_of(name))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_reads_no_expert_of_another(loaded, name, way):
    """And what it holds of its own, several times where the load balancer has put them so, has been compared."""
    assert len(loaded(name)[f"read {name}"][way]["experts"]) == {"TP 2": 8, "EP 2": 4, "EP 2, balanced": 6}[way]
    check_reads(loaded(name)[f"read {name}"][way], split=way == "TP 2" and name == "plain")


@pytest.mark.parametrize("name", in_groups(["plain", *FORMATS]))
def test_each_rank_holds_its_shard_on_a_cpu(loaded, name):
    assert len(loaded(name)[name]) == len(RANKS)
    assert not any(loaded(name)[name].values())
    assert name == "plain" or len(loaded(name)[f"{name}-mixed"]) == len(OUTER_RANKS)


@pytest.mark.parametrize("name", in_groups(FORMATS))
def test_each_rank_holds_its_shard_in_codes_where_compiled_products_take_them(loaded, name):
    """Of every format every layer, also those whose blocks are wider than a rank's part; compared when loaded."""
    assert len(loaded(name)[f"{name}, codes"]) == 2
    for rank, held in loaded(name)[f"{name}, codes"].items():
        assert set(held) >= LAYERS | SHARED, rank


@pytest.mark.parametrize("name", in_groups(ON_GPU))
def test_each_rank_holds_its_shard_as_stored(loaded, record_property, name):
    ranks = loaded(name)[f"{name}, as on a GPU"]
    assert len(ranks) == len(RANKS)
    for rank, as_stored in ranks.items():
        assert set(as_stored) >= LAYERS, rank
        dequantized = DEQUANTIZED_AT_8.get(name, set()) if rank.endswith(" of 8") else set()
        assert SHARED - set(as_stored) == dequantized, rank
    record_property("matrix", f"{name} | SGLang | TP 1, 2, 4, 8 | parameters match")


@pytest.mark.parametrize("name", in_groups(REFUSED_ON_GPU))
def test_experts_without_a_method_are_refused_on_a_gpu(loaded, record_property, name):
    reason, what = REFUSED_ON_GPU[name]
    assert reason in loaded(name)[f"{name}, as on a GPU"]["refused"]
    shown = f"dequantized parameters match; refused on a GPU, where SGLang has no kernel for {what}"
    record_property("matrix", f"{name} | SGLang | TP 1, 2, 4, 8 | {shown}")


@pytest.mark.parametrize("name", in_groups(ON_GPU))
def test_what_is_quantized_is_what_the_headers_say(loaded, name):
    """Not the exclude lists, which match nothing here; `k_proj`, the draft's experts and more are bfloat16."""
    ranks = loaded(name)[f"{name}-mixed, as on a GPU"]
    assert len(ranks) == len(OUTER_RANKS)
    for rank, as_stored in ranks.items():
        assert f"{TARGET}layers.1.self_attn.qkv_proj.weight" not in as_stored, rank
        assert not any(DRAFT in layer and "experts" in layer for layer in as_stored), rank
    assert f"{DRAFT}fc.weight" in ranks["0 of 1"]
    assert f"{TARGET}layers.0.linear_attn.out_proj.weight" in ranks["0 of 1"]
