"""Which layers can be served as stored, and the dequantized weights of the others."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.merged import MERGED, layer_name, layer_of, modules_of, packed_modules
from qnext_plugin.checkpoint.quantized_layers import (
    Engine,
    choose_method,
    converted,
    reports,
    view_of,
    without_exclusions,
)
from qnext_plugin.checkpoint.stored import read_checkpoint
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
    config, stored = QNextConfig.from_pretrained(checkpoint), read_checkpoint(str(checkpoint))
    found = stored.obstacle(stored.parts(prefix, config.num_experts), config, tp_size)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("layer", "part", "bits"),
    [("model.layers.1.self_attn.qkv_proj", "k_proj", 8), (EXPERTS, "0.down_proj", 8), (EXPERTS, "0.down_proj", 16)],
)
def test_parts_of_other_bits_are_no_layer_as_stored(checkpoint, tmp_path, layer, part, bits):
    quantize_checkpoint(checkpoint.parent / "source", tmp_path / "gptq", format="gptq")
    config, stored = QNextConfig.from_pretrained(tmp_path / "gptq"), read_checkpoint(str(tmp_path / "gptq"))
    parts = stored.parts(layer, config.num_experts)
    assert stored.obstacle(parts, config, 1) is None
    name = next(name for name in parts if name.endswith(part))
    words = parts[name]["qweight"]
    other = replace(words, shape=(2 * words.shape[0], words.shape[1])) if bits == 8 else replace(words, dtype="F16")
    parts[name] = {**parts[name], "qweight": other}
    assert stored.obstacle(parts, config, 1) == "its parts are stored in different ways"


def test_layers_hold_modules():
    assert layer_name("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.qkv_proj"
    assert layer_name("mtp.layers.0.mlp.experts.17.down_proj") == "model.layers.0.mlp.experts"
    assert layer_name("model.layers.0.linear_attn.in_proj_z") == "model.layers.0.linear_attn.in_proj_qkvz"
    assert layer_name("lm_head") == "lm_head" and layer_name("mtp.fc") == "model.fc"
    for last, merged in MERGED.items():
        for part in merged.parts:
            assert f"mtp.x.{part}" in modules_of(f"mtp.x.{last}", 0)
            assert layer_of(f"mtp.x.{part}") == f"mtp.x.{last}"
    assert modules_of("x.experts", 2)[3:] == ["x.experts.1.gate_proj", "x.experts.1.up_proj", "x.experts.1.down_proj"]
    assert packed_modules(grouped=False) == {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    assert packed_modules(grouped=True)["in_proj_qkvz"] == ["in_proj_qkvz"]


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
    tensors = {n: t for n, t in load_file(checkpoint / "model.safetensors").items() if n not in left_out}
    stored, layers = read_checkpoint(str(checkpoint)), dict(model.named_modules())
    return dict(converted(tensors.items(), stored, layers, is_plain, has_expert, torch.bfloat16))


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
    model = model_of({EXPERTS: "no kernel", "model.layers.0.linear_attn.in_proj_ba": "rows"})
    lines = reports(read_checkpoint(str(checkpoint)), dict(model.named_modules()), is_plain, draft=False)
    assert sorted(lines) == [
        "dequantized while loading: model.layers.0.linear_attn.in_proj_ba (rows)",
        "dequantized while loading: model.layers.0.mlp.experts.{0..2}.down_proj; "
        "model.layers.0.mlp.experts.{0..2}.gate_proj; model.layers.0.mlp.experts.{0..2}.up_proj (no kernel)",
    ]


class Method:
    """A quantization method of an engine."""

    def __init__(self, refusal=None):
        self.refusal = refusal

    def create_weights(self, layer, size, weight_loader):
        layer.scheme, layer.weight = "half made", nn.Parameter(torch.empty(size))
        layer.weight.weight_loader = weight_loader
        if self.refusal:
            raise self.refusal


class Plain(Method):
    """One that holds floating-point weights."""


ENGINE = Engine("Engine", (Plain,), lambda layer: Plain(), lambda layer: {"weight_loader": 2})
OUT_OF_MEMORY = torch.OutOfMemoryError("memory")
MISTAKE = KeyError("a mistake")


def constructed(choose, reason=None, must_be_stored=False):
    layer = nn.Module()
    options = {"quantization": "fp8", "must_be_stored": must_be_stored}
    layer.quant_method = choose_method(ENGINE, layer, reason, choose, **options)
    layer.quant_method.create_weights(layer, 3, weight_loader=1)
    return layer


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("choose", "reason", "said"),
    [
        (Method, None, None),
        (Method, "rows", "rows"),
        (Plain, None, "Engine has no fp8 method for it"),
        (lambda: None, None, "Engine has no fp8 method for it"),
        (lambda: raising(NotImplementedError("no\n kernel")), None, "Engine: no kernel"),
        (lambda: Method(refusal=ValueError("too\nsmall")), None, "Engine: too small"),
    ],
)
def test_a_layer_is_served_as_stored_or_says_why_not(choose, reason, said):
    layer = constructed(choose, reason)
    assert getattr(layer, "dequantized", None) == said
    assert ENGINE.is_plain(layer) == (said is not None)
    assert "create_weights" not in vars(layer.quant_method)
    assert len(layer._parameters) == 1


def test_nothing_is_left_of_a_refused_method():
    layer = constructed(lambda: Method(refusal=ValueError("too small")))
    assert layer.weight.weight_loader == 2, "a plain layer has its own loader"
    layer = nn.Module()
    method = choose_method(
        Engine("Engine", (), lambda layer: SimpleNamespace(create_weights=lambda *_, **__: None)),
        *(layer, None, lambda: Method(refusal=ValueError())),
        quantization="fp8",
        must_be_stored=False,
    )
    method.create_weights(layer, 3, weight_loader=1)
    assert not layer._parameters and not hasattr(layer, "scheme")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("error", "must_be_stored"), [(ValueError("no"), True), (OUT_OF_MEMORY, False), (MISTAKE, False)]
)
def test_what_is_no_refusal_or_may_not_be_refused_is_raised(at_once, error, must_be_stored):
    with pytest.raises(type(error)):
        constructed(lambda: raising(error) if at_once else Method(refusal=error), must_be_stored=must_be_stored)


@pytest.mark.parametrize(
    ("choose", "reason", "said"),
    [(Method, "rows", "rows"), (Plain, None, "no fp8 method"), (lambda: None, None, "no fp8")],
)
def test_experts_are_never_plain_where_they_must_be_stored(choose, reason, said):
    with pytest.raises(ValueError, match=rf"cannot serve these experts as stored \(.*{said}"):
        constructed(choose, reason=reason, must_be_stored=True)


def test_a_view_has_the_type_and_the_name_of_the_engines_configuration():
    class Fp8Config:
        def __init__(self):
            self.block, self.answers = 128, "engine's"

        def get_name(self):
            return "fp8"

        def get_quant_method(self):
            return self.answers

    class Ours:
        def get_quant_method(self):
            return f"ours for {self.layer}"

    config = Fp8Config()
    view = view_of(config, Ours, layer=3)
    assert isinstance(view, Fp8Config) and type(view).__name__ == "Fp8Config"
    assert (view.get_name(), view.block, view.get_quant_method()) == ("fp8", 128, "ours for 3")
    assert type(config) is Fp8Config and config.get_quant_method() == "engine's" and not hasattr(config, "layer")


def test_exclusions_are_undone_on_a_copy():
    settings = {"-:lm_head": {}, ".*mlp.*": {"bits": 8}}
    full = {"modules_to_not_convert": ["mlp"], "bits": 4}
    config = SimpleNamespace(
        ignore=["lm_head"], dynamic=settings, lm_head_quantized=False, group_size=32, full_config=full
    )
    view = without_exclusions(config)
    assert vars(view) == {
        "ignore": [],
        "dynamic": {".*mlp.*": {"bits": 8}},
        "lm_head_quantized": True,
        "group_size": 32,
        "full_config": {"bits": 4},
    }
    assert config.ignore == ["lm_head"] and not config.lm_head_quantized


class Parser:
    def __init__(self, config):
        self.config = config


def test_exclusions_of_auto_round_and_quark_are_undone():
    settings = {"mlp.gate": {"bits": 16}, "q_proj": {"bits": 8}, "k_proj": {"group_size": 32}}
    config = SimpleNamespace(block_name_to_quantize=["model.layers"], extra_config=settings, weight_bits=4)
    config.config_parser = Parser(config)
    view = without_exclusions(config)
    assert view.config_parser.config is view and config.config_parser.config is config
    assert view.block_name_to_quantize is None
    assert view.extra_config == {"q_proj": {"bits": 8}, "k_proj": {"bits": 4, "group_size": 32}}
    view = without_exclusions(SimpleNamespace(quant_config={"exclude": ["lm_head"], "export": 1}))
    assert vars(view) == {"quant_config": {"exclude": [], "export": 1}}
