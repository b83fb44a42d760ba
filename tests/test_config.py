"""Reading and validating config.json, in both dialects."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

from qnext_plugin.config import FULL, KEYS, LARGEST, LINEAR, GatedDeltaNetDims, QNextConfig
from tests.support.configs import PUBLISHED

YARN = {"factor": 4.0, "original_max_position_embeddings": 65536}


def published(**changes):
    return {**PUBLISHED, **changes}


def without(*names, **changes):
    return {name: value for name, value in published(**changes).items() if name not in names}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"full_attention_interval": 1},
        {"num_hidden_layers": 7, "full_attention_interval": 4},
        {"layer_types": [FULL, LINEAR, LINEAR, FULL, FULL, LINEAR]},
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "type": "default", **YARN}},
        {"mlp_only_layers": [1, 4], "decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True},
    ],
)
def test_both_dialects_give_the_same_config(changes):
    raw = published(**changes)
    rewritten = json.loads(Qwen3NextConfig.from_dict(json.loads(json.dumps(raw))).to_json_string(use_diff=False))
    assert {"layer_types", "rope_parameters"} <= rewritten.keys()
    assert not {"rope_scaling", "rope_theta"} & rewritten.keys()
    rewritten.pop("full_attention_interval", None)
    assert QNextConfig.from_dict(rewritten) == QNextConfig.from_dict(raw)


def test_fields_agree_with_transformers():
    ours, theirs = QNextConfig.from_dict(PUBLISHED), Qwen3NextConfig.from_dict(dict(PUBLISHED))
    for name in set(KEYS) - {
        "layer_types",
        "mlp_only_layers",
        "num_nextn_predict_layers",
    }:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types == [LINEAR, LINEAR, FULL] * 2


def test_defaults_agree_with_transformers():
    defaults = Qwen3NextConfig()
    required = {name: PUBLISHED[name] for name in PUBLISHED if name.startswith(("vocab", "hidden", "num_", "linear_"))}
    ours = QNextConfig.from_dict({"rope_theta": 1e4, **required, "num_experts": None, "num_experts_per_tok": None})
    for name in set(KEYS) - required.keys() | {"num_experts", "num_experts_per_tok"}:
        if name not in ("layer_types", "mlp_only_layers", "rope_parameters", "num_nextn_predict_layers"):
            assert getattr(ours, name) == getattr(defaults, name), name
    assert ours.rope_parameters == {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert ours.layer_types == (LINEAR, LINEAR, LINEAR, FULL, LINEAR, LINEAR)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 0},  # whether there is a draft, its tensors tell
        {"mlp_only_layers": None, "decoder_sparse_step": None, "rope_parameters": None},
        {"per_layer_num_experts": [9] * 6},
        {"per_layer_num_experts": {"0": 9}},
        {"mtp_num_experts": 3},  # not a key of config.json
    ],
)
def test_keys_that_change_nothing(changes):
    assert QNextConfig.from_dict(published(**changes)) == QNextConfig.from_dict(PUBLISHED)


def test_yarn_keys_are_complete_and_rope_scaling_overrides_rope_parameters():
    stale = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.5, "type": None}
    scaling = {"type": "yarn", "factor": 4, "beta_fast": None}
    raw = without("partial_rotary_factor", rope_parameters=stale, rope_scaling=scaling)
    assert QNextConfig.from_dict(raw).rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.5,
        "factor": 4,
        "original_max_position_embeddings": 262144,
    }


def test_rope_parameters_win_over_a_stale_top_level():
    config = QNextConfig.from_dict(published(rope_parameters={"rope_theta": 5, "partial_rotary_factor": 0.5}))
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["partial_rotary_factor"]) == (5, 0.5)


def test_derived_dimensions():
    config = QNextConfig.from_dict(PUBLISHED)
    assert config.rotary_dim == 10
    assert config.gdn == GatedDeltaNetDims(4, 12, 5, 7, 3)
    assert (config.gdn.key_dim, config.gdn.value_dim, config.gdn.conv_dim) == (20, 84, 124)
    assert config.gdn.heads_per_group == 3


@pytest.mark.parametrize("tp_size, expected", [(1, (4, 12)), (2, (2, 6)), (4, (1, 3))])
def test_a_rank_holds_whole_groups(tp_size, expected):
    assert GatedDeltaNetDims(4, 12, 5, 7, 3).shard(tp_size) == GatedDeltaNetDims(*expected, 5, 7, 3)


@pytest.mark.parametrize("tp_size", (-2, 0, 3, 8))
def test_a_group_is_never_split(tp_size):
    with pytest.raises(ValueError, match=rf"size {tp_size} does not divide .* 4; choose one of \[1, 2, 4\]"):
        GatedDeltaNetDims(4, 12, 5, 7).shard(tp_size)


@pytest.mark.parametrize(
    "changes, sparse",
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"mlp_only_layers": [0, 4]}, [1, 2, 3, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"num_experts": 0}, []),
    ],
)
def test_sparse_layers(changes, sparse):
    config = QNextConfig.from_dict(published(**changes))
    assert [i for i in range(6) if config.is_sparse(i)] == sparse


SIZE = rf"expected an integer from 1 to {LARGEST}"


@pytest.mark.parametrize(
    "raw, message",
    [
        (published(model_type="qwen3_moe"), "model_type is 'qwen3_moe', expected 'qwen3_next'"),
        (without("hidden_size", "vocab_size"), "missing vocab_size, hidden_size"),
        (without("rope_theta"), "rope_theta is missing"),
        (published(layer_types=LINEAR), "layer_types is 'linear_attention', expected a list"),
        (published(layer_types=[LINEAR] * 5), "layer_types has 5 entries for num_hidden_layers 6"),
        (published(layer_types=[LINEAR] * 5 + ["mamba"]), "layer_types holds 'mamba', expected 'linear_attention'"),
        (published(mlp_only_layers=3), "mlp_only_layers is 3, expected a list"),
        (published(mlp_only_layers=[0, 6]), r"mlp_only_layers \[0, 6\] is outside 0\.\.5"),
        (published(mlp_only_layers=[True]), "mlp_only_layers .* is outside"),
        (published(full_attention_interval=0), f"full_attention_interval is 0, {SIZE}"),
        (published(full_attention_interval=True), f"full_attention_interval is True, {SIZE}"),
        (published(num_hidden_layers="6"), f"num_hidden_layers is '6', {SIZE}"),
        (published(num_hidden_layers=LARGEST + 1), f"num_hidden_layers is {LARGEST + 1}, {SIZE}"),
        (published(head_dim=True), f"head_dim is True, {SIZE}"),
        (published(decoder_sparse_step=0), f"decoder_sparse_step is 0, {SIZE}"),
        (published(num_key_value_heads=4), "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        (published(linear_num_value_heads=10), "linear_num_value_heads 10 is not a multiple of linear_num_key_heads 4"),
        (published(num_experts=-1), f"num_experts is -1, expected an integer from 0 to {LARGEST}"),
        (published(num_experts=False), "num_experts is False, expected an integer"),
        (published(num_experts_per_tok=10), "num_experts_per_tok 10 exceeds num_experts 9"),
        (
            published(per_layer_num_experts=[9, 9, 7, 9, 5, 9]),
            "per_layer_num_experts holds 5, 7, expected num_experts 9",
        ),
        (published(per_layer_num_experts={"0": 8}), "per_layer_num_experts holds 8, expected num_experts 9"),
        (published(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (published(norm_topk_prob="false"), "norm_topk_prob is 'false', expected true or false"),
        (published(tie_word_embeddings=0), "tie_word_embeddings is 0, expected true or false"),
        (published(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', expected a positive number"),
        (published(partial_rotary_factor=0.02), "partial_rotary_factor 0.02 rotates 0 of head_dim 40"),
        (published(partial_rotary_factor=0.075), "rotates 3 of head_dim 40, expected an even number"),
        (published(partial_rotary_factor=1.5), "partial_rotary_factor is 1.5, expected a number above 0 and up to 1"),
        (published(rope_theta=0), "rope_theta is 0, expected a number above 0"),
        (published(rope_theta=float("inf")), "rope_theta is inf, expected a number above 0"),
        (published(rope_parameters=[1]), r"rope_parameters is \[1\], expected an object"),
        (published(rope_scaling="yarn"), "rope_scaling is 'yarn', expected an object"),
        (published(rope_scaling={"type": "linear"}), r"rope_type is 'linear', expected one of \['default', 'yarn'\]"),
        (published(rope_scaling={"type": "yarn"}), "YaRN's factor is None, expected a positive number"),
        (
            published(rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": "64k"}),
            "YaRN's original_max_position_embeddings is '64k', expected a positive number",
        ),
    ],
)
def test_an_inconsistent_config_is_refused(raw, message):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        QNextConfig.from_dict(raw)


def test_every_inconsistency_is_named_at_once():
    with pytest.raises(ValueError, match=r"^config\.json: ") as e:
        QNextConfig.from_dict(published(hidden_act="relu", linear_num_value_heads=10, num_experts_per_tok=20))
    assert all(name in str(e.value) for name in ("hidden_act", "linear_num_value_heads", "num_experts_per_tok"))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "not a readable config.json"),
        (b"{", "not a readable"),
        (b"\xff", "not a readable"),
        (b"[]", "found list"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        QNextConfig.from_pretrained(tmp_path)


def test_from_pretrained_reads_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert QNextConfig.from_pretrained(str(tmp_path)) == QNextConfig.from_dict(PUBLISHED)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 50),
    st.sampled_from((2**63, -(2**63), 10**400, 1e308, 5e-324)),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from((LINEAR, FULL, "yarn", "default", "silu")),
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
rope_values = st.dictionaries(
    st.sampled_from(("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", *list(YARN))), json_values
)
MUTATED = sorted({*PUBLISHED, *KEYS, "per_layer_num_experts"})


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from(MUTATED), json_values, min_size=1, max_size=4),
    st.fixed_dictionaries({}, optional={"rope_scaling": rope_values, "rope_parameters": rope_values}),
    st.sets(st.sampled_from(MUTATED), max_size=2),
)
def test_junk_is_read_or_refused_with_value_error(junk, rope, dropped):
    raw = {name: value for name, value in published(**junk).items() if name not in dropped} | rope
    try:
        config = QNextConfig.from_dict(raw)
    except ValueError as e:
        assert str(e).startswith("config.json: ")
    else:
        assert [config.is_sparse(i) for i in range(config.num_hidden_layers)]
        assert 2 <= config.rotary_dim <= config.head_dim
        assert config.gdn.shard(config.gdn.num_k_heads).num_k_heads == 1
