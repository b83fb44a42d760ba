"""Quantized checkpoints: written in the published forms, read back, and refused when they are not whole."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.coverage import check_coverage
from qnext_plugin.checkpoint.formats import dequantize, stored_format
from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantization import (
    check_quantization,
    is_quantized,
    stored_modules,
)
from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.checkpoint.schema import weight_shapes
from qnext_plugin.cli.checkpoint import _FORMATS
from qnext_plugin.config import QNextConfig
from tests.support.dequantized import dequantized
from tests.support.quantized import FORMS

SIZES = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 8,
    "hidden_size": 160,  # not a whole number of FP8 blocks
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
EVERYTHING = r".*\.shared_expert_gate"  # one row cannot be packed
LINEAR, EXPERT = "model.layers.0.linear_attn", "model.layers.0.mlp.experts"
# How `in_proj_qkvz` of each format is stored, which tells it apart from every other.
STORED = {
    "fp8-block": "weight F8_E4M3, weight_scale_inv BF16",
    "fp8-channel": "weight F8_E4M3, weight_scale BF16",
    "w8a8": "weight I8, weight_scale BF16",
    "w4a16": "weight_packed I32, weight_scale BF16, weight_shape I64",
    "mxfp8": "weight F8_E4M3, weight_scale U8",
    "mxfp4": "weight_packed U8, weight_scale U8",
    "nvfp4-llm-compressor": "weight_global_scale F32, weight_packed U8, weight_scale F8_E4M3",
    "awq": "qweight I32, qzeros I32, scales F16",
    "gptq": "g_idx I32, qweight I32, qzeros I32, scales F16",
    "gptq-int8": "g_idx I32, qweight I32, qzeros I32, scales F16",
    "nvfp4": "input_scale F32, weight U8, weight_scale F8_E4M3, weight_scale_2 F32",
    "mxfp4-quark": "weight U8, weight_scale U8",
}
# Root mean square of rounding, as a share of the weights': a quarter of a step and more is another weight.
ROUNDING = {"fp8-block": 0.04, "fp8-channel": 0.04, "mxfp8": 0.04, "w8a8": 0.01, "gptq-int8": 0.01}
INT4_OR_FP4 = 0.12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    write_random_checkpoint(directory, overrides=SIZES)
    return directory


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, source):
    root = tmp_path_factory.mktemp("quantized")
    for name in FORMATS:
        quantize_checkpoint(source, root / name, format=name)
        quantize_checkpoint(source, root / f"{name}-everything", format=name, ignore=EVERYTHING)
    return root


def dtypes(leaves):
    return ", ".join(f"{leaf} {info.dtype}" for leaf, info in sorted(leaves.items()))


def raw_config(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_complete_and_in_the_published_form(quantized, source, name):
    headers = read_headers(quantized / name)
    config = raw_config(quantized / name)
    check_coverage(QNextConfig.from_dict(config), headers, mtp="required")
    shapes = weight_shapes(QNextConfig.from_dict(config))
    check_quantization(headers, config["quantization_config"], shapes)
    modules = stored_modules(headers)
    assert dtypes(modules[f"{LINEAR}.in_proj_qkvz"]) == STORED[name]
    assert stored_format(modules[f"{LINEAR}.in_proj_qkvz"]) == FORMATS[name].name
    for plain in (f"{LINEAR}.in_proj_ba", "mtp.fc", "lm_head", "model.layers.1.mlp.gate", "model.norm"):
        assert dtypes(modules[plain]) == "weight BF16"
    without = {key: value for key, value in config.items() if key != "quantization_config"}
    assert without == raw_config(source)


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_in_a_format_are_those_of_the_quantized_checkpoint(quantized, tmp_path, name):
    write_random_checkpoint(tmp_path, overrides=SIZES, format=name, max_shard_size=200_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    expected = load_file(quantized / name / "model.safetensors")
    assert len(files) > 2 and found.keys() == expected.keys() == read_headers(tmp_path).keys()
    assert raw_config(tmp_path) == raw_config(quantized / name)
    for key, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[key].dtype, expected[key].shape), key
        bits = [each.reshape(-1).view(torch.uint8) for each in (tensor, expected[key])]
        assert torch.equal(*bits), key


@pytest.fixture
def default_dtype():
    """While an engine loads a model, torch's default is the model's type."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", FORMATS)
def test_every_module_dequantizes_as_compressed_tensors_does_and_close_to_its_source(
    quantized, source, name, default_dtype
):
    directory = quantized / f"{name}-everything"
    stored, plain = load_file(directory / "model.safetensors"), load_file(source / "model.safetensors")
    config = raw_config(directory)["quantization_config"]
    expected = dequantized(directory)
    assert expected.keys() == plain.keys()
    default_dtype(torch.bfloat16)
    count = 0
    for module, leaves in stored_modules(read_headers(directory)).items():
        if is_quantized(leaves):
            actual = dequantize({leaf: stored[f"{module}.{leaf}"] for leaf in leaves}, config)
            # Theirs rounds where a scale is a product of two.
            torch.testing.assert_close(actual, expected[f"{module}.weight"], rtol=1e-6, atol=0, msg=module)
            weight = plain[f"{module}.weight"].float()
            error = (actual - weight).square().mean() / weight.square().mean()
            assert error.sqrt() < ROUNDING.get(name, INT4_OR_FP4), module
            count += 1
    assert count > 40


def edited(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return read_headers(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda t: t.pop(f"{LINEAR}.in_proj_qkvz.weight_scale_inv"),
            ["without a scale 1", f"{LINEAR}.in_proj_qkvz"],
            id="scale-missing",
        ),
        pytest.param(
            lambda t: t.update({f"{LINEAR}.out_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}),
            ["with two weights 1", f"{LINEAR}.out_proj"],
            id="two-weights",
        ),
        pytest.param(
            lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"),
            ["without a weight 1", "self_attn.o_proj"],
            id="weight-missing",
        ),
        pytest.param(
            lambda t: (
                t.pop(f"{EXPERT}.1.up_proj.weight_scale_inv"),
                t.update({f"{EXPERT}.1.up_proj.weight": t[f"{EXPERT}.1.up_proj.weight"].bfloat16()}),
            ),
            [f"{EXPERT} (", f"{EXPERT}.1.up_proj: weight BF16"],
            id="unlike-experts",
        ),
    ],
)
def test_an_incomplete_or_mixed_checkpoint_is_refused_by_name(source, tmp_path, change, words):
    quantize_checkpoint(source, tmp_path / "checkpoint", format="fp8-block")
    headers = edited(tmp_path / "checkpoint", change)
    with pytest.raises(ValueError, match="incomplete or mixed") as error:
        check_quantization(headers, {"quant_method": "fp8"}, {})
    for word in words:
        assert word in str(error.value)


def test_quantized_tensors_without_a_quantization_config_are_refused(quantized):
    with pytest.raises(ValueError, match=r"config\.json has no quantization_config"):
        check_quantization(read_headers(quantized / "fp8-block"), None, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int3"}, "format is 'int3', expected one of fp8-block"),
        (
            {"format": "gptq", "group_size": 64},
            r"group size 64 does not divide the inputs of .* \[640, 160\]",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(source, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_refused(quantized, tmp_path):
    with pytest.raises(ValueError, match="has a quantization_config already"):
        quantize_checkpoint(quantized / "w8a8", tmp_path / "out", format="gptq")


def test_every_list_of_formats_has_them_all():
    root = Path(__file__).parent.parent
    table = runpy.run_path(str(root / "scripts" / "quantization_table.py"))["FORMATS"]
    assert set(_FORMATS) == set(FORMATS) and set(table) == set(FORMS)
