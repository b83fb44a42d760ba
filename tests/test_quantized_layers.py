"""Which layers can be served as stored, and the dequantized weights of the others."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantization import stored_modules
from qnext_plugin.checkpoint.quantized_layers import (
    build,
    dequantized,
    layer_name,
    obstacle,
    quantized_parts,
    reports,
    without_exclusions,
)
from qnext_plugin.config import QNextConfig
from tests.support import dequantized as oracle

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
    found = obstacle(quantized_parts(prefix, config, modules), config, {"quant_method": "fp8"}, tp_size)
    assert found is None if reason is None else reason in found


def test_layers_hold_modules():
    assert layer_name("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.qkv_proj"
    assert layer_name("mtp.layers.0.mlp.experts.17.down_proj") == "model.layers.0.mlp.experts"
    assert layer_name("model.layers.0.linear_attn.in_proj_z") == "model.layers.0.linear_attn.in_proj_qkvz"
    assert layer_name("lm_head") == "lm_head" and layer_name("mtp.fc") == "model.fc"


def model_of(layers):
    """A model whose layers, by name, are plain; None: without a reason, else with one."""
    model = nn.Module()
    for name, reason in layers.items():
        inner = model
        for part in name.split("."):
            if part not in dict(inner.named_children()):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.is_plain = True
        if reason:
            inner.dequantized = reason
    return model


def is_plain(layer):
    return hasattr(layer, "is_plain")


def stream(checkpoint, plain, has_expert, left_out=()):
    model = model_of({"model.layers.0.linear_attn.in_proj_qkvz": None} | dict.fromkeys(plain))
    del model.get_submodule("model.layers.0.linear_attn.in_proj_qkvz").is_plain
    modules = stored_modules(read_headers(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    tensors = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if n not in left_out}
    return dict(dequantized(tensors.items(), modules, config, model, is_plain, has_expert, torch.bfloat16))


def test_only_plain_layers_are_dequantized_and_only_experts_of_this_rank(checkpoint):
    plain, exact = {"model.layers.0.linear_attn.out_proj", EXPERTS}, oracle.dequantized(checkpoint)
    found = stream(checkpoint, plain, lambda _, expert: expert == 1)
    for name in ("model.layers.0.linear_attn.out_proj.weight", f"{EXPERTS}.1.up_proj.weight"):
        assert torch.equal(found[name], exact[name].bfloat16())
    assert not any(f"{EXPERTS}.{other}." in name for name in found for other in (0, 2))
    assert found["model.layers.0.linear_attn.in_proj_qkvz.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn


def test_a_part_of_a_module_is_not_dropped_in_silence(checkpoint):
    scale = f"{EXPERTS}.1.up_proj.weight_scale_inv"
    with pytest.raises(ValueError, match=r"tensors are missing of quantized modules: .*experts\.1\.up_proj"):
        stream(checkpoint, {EXPERTS}, lambda *_: True, left_out={scale})


def test_one_line_for_each_reason(checkpoint):
    modules = stored_modules(read_headers(checkpoint))
    model = model_of({EXPERTS: "no kernel", "model.layers.0.linear_attn.in_proj_ba": "rows"})
    lines = reports(modules, model, is_plain, draft=False)
    assert sorted(lines) == [
        "dequantized while loading: model.layers.0.linear_attn.in_proj_ba (rows)",
        "dequantized while loading: model.layers.0.mlp.experts.{0..2}.down_proj; "
        "model.layers.0.mlp.experts.{0..2}.gate_proj; model.layers.0.mlp.experts.{0..2}.up_proj (no kernel)",
    ]


@pytest.mark.parametrize(
    ("given", "error", "plain", "said"),
    [
        (None, None, False, None),
        ("rows", None, False, "rows"),
        (None, None, True, "Engine has no fp8 method for it"),
        (None, NotImplementedError("no\n kernel"), False, "Engine: no kernel"),
    ],
)
def test_a_layer_is_served_as_stored_or_says_why_not(given, error, plain, said):
    config = SimpleNamespace(ignore=["lm_head"], get_name=lambda: "fp8")

    def make(quant_config):
        if quant_config and error:
            raise error
        assert quant_config is None or quant_config.ignore == []
        layer = nn.Module()
        if plain or quant_config is None:
            layer.is_plain = True
        return layer

    layer = build(make, config, given, is_plain, engine="Engine", must_be_stored=False)
    assert (getattr(layer, "dequantized", None), is_plain(layer)) == (said, said is not None)
    if error:
        with pytest.raises(NotImplementedError):
            build(make, config, given, is_plain, engine="Engine", must_be_stored=True)


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
