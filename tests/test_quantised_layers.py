"""Which layers can be served as stored, and the dequantised weights of the others."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qnext_plugin.checkpoint import read_headers
from qnext_plugin.config import QNextConfig
from qnext_plugin.quantised_layers import (
    dequantised,
    layer_name,
    obstacle,
    quantised_parts,
    reports,
    without_exclusions,
)
from qnext_plugin.quantization import stored_modules
from qnext_plugin.quantize import quantize_checkpoint
from qnext_plugin.random_checkpoint import write_random_checkpoint
from tests import dequantised as oracle

SIZES = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 3,
    "hidden_size": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "shared_expert_intermediate_size": 256,
}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(root / "source", overrides=SIZES)
    quantize_checkpoint(root / "source", root / "fp8-block", format="fp8-block", ignore=r".*gate|lm_head|.*k_proj")
    return root / "fp8-block"


@pytest.mark.parametrize(
    ("prefix", "tp_size", "reason"),
    [
        ("model.layers.0.linear_attn.in_proj_qkvz", 4, None),
        ("model.layers.0.linear_attn.in_proj_ba", 1, "a packed word or block holds rows of several sections"),
        ("model.layers.1.self_attn.qkv_proj", 1, "its parts are stored in different ways"),
        ("model.layers.0.mlp.shared_expert.gate_up_proj", 2, None),
        ("model.layers.0.mlp.shared_expert.gate_up_proj", 4, "would be split among 4 ranks"),
        ("model.layers.0.mlp.shared_expert.down_proj", 4, "would be split among 4 ranks"),
        ("mtp.layers.0.mlp.shared_expert.down_proj", 2, None),
    ],
)
def test_obstacles(checkpoint, prefix, tp_size, reason):
    config, modules = QNextConfig.from_pretrained(checkpoint), stored_modules(read_headers(checkpoint))
    found = obstacle(quantised_parts(prefix, config, modules), config, {"quant_method": "fp8"}, tp_size)
    assert found is None if reason is None else reason in found


def test_layers_hold_modules():
    assert layer_name("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.qkv_proj"
    assert layer_name("mtp.layers.0.mlp.experts.17.down_proj") == "model.layers.0.mlp.experts"
    assert layer_name("model.layers.0.linear_attn.in_proj_z") == "model.layers.0.linear_attn.in_proj_qkvz"
    assert layer_name("lm_head") == "lm_head" and layer_name("mtp.fc") == "model.fc"


def stream(checkpoint, is_plain, has_expert, left_out=()):
    modules = stored_modules(read_headers(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    tensors = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if n not in left_out}
    return dict(dequantised(tensors.items(), modules, config, is_plain, has_expert, torch.bfloat16))


def test_only_plain_layers_are_dequantised_and_only_experts_of_this_rank(checkpoint):
    plain, exact = {"model.layers.0.linear_attn.out_proj", EXPERTS}, oracle.dequantised(checkpoint)
    found = stream(checkpoint, plain.__contains__, lambda _, expert: expert == 1)
    for name in ("model.layers.0.linear_attn.out_proj.weight", f"{EXPERTS}.1.up_proj.weight"):
        assert torch.equal(found[name], exact[name].bfloat16())
    assert not any(f"{EXPERTS}.{other}." in name for name in found for other in (0, 2))
    assert found["model.layers.0.linear_attn.in_proj_qkvz.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn


def test_a_part_of_a_module_is_not_dropped_in_silence(checkpoint):
    scale = f"{EXPERTS}.1.up_proj.weight_scale_inv"
    with pytest.raises(ValueError, match=r"tensors are missing of quantised modules: .*experts\.1\.up_proj"):
        stream(checkpoint, EXPERTS.__eq__, lambda *_: True, left_out={scale})


def test_one_line_for_each_reason(checkpoint):
    modules = stored_modules(read_headers(checkpoint))
    lines = reports(modules, {EXPERTS: "no kernel", "model.layers.0.linear_attn.in_proj_ba": "rows"}.get, draft=False)
    assert sorted(lines) == [
        "dequantised while loading: model.layers.0.linear_attn.in_proj_ba (rows)",
        "dequantised while loading: model.layers.0.mlp.experts.{0..2}.down_proj; "
        "model.layers.0.mlp.experts.{0..2}.gate_proj; model.layers.0.mlp.experts.{0..2}.up_proj (no kernel)",
    ]


def test_exclusions_are_undone_on_a_copy():
    settings = {"-:lm_head": {}, ".*mlp.*": {"bits": 8}}
    config = SimpleNamespace(ignore=["lm_head"], dynamic=settings, lm_head_quantized=False, group_size=32)
    view = without_exclusions(config)
    assert vars(view) == {
        "ignore": [],
        "dynamic": {".*mlp.*": {"bits": 8}},
        "lm_head_quantized": True,
        "group_size": 32,
    }
    assert config.ignore == ["lm_head"] and not config.lm_head_quantized
