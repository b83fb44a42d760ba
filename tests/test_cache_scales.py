"""Scales for an FP8 cache: under which names they are known, and which of them are refused before a weight is read."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.cache_scales import asks_for_fp8_cache, cache_scale, for_attention
from qnext_plugin.checkpoint.coverage import RefusedUpdate, UpdateCheck
from qnext_plugin.checkpoint.headers import read_headers
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.stored import Checkpoint, read_checkpoint
from qnext_plugin.config import QNextConfig
from tests.support.cache_scales import NAMES, SETTINGS, add_cache_scales, scale

TENSOR = SETTINGS["compressed-tensors"]["kv_cache_scheme"]
LAYERS = ("model.layers.1.self_attn", "mtp.layers.0.self_attn")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint with each quantizer's scales."""
    root = tmp_path_factory.mktemp("scales")
    sizes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2}
    write_random_checkpoint(root / "source", overrides=sizes | {"num_experts_per_tok": 1})
    for form in NAMES:
        quantize_checkpoint(root / "source", root / form, format="fp8-channel")
        add_cache_scales(root / form, form)
    return root


@pytest.mark.parametrize("form", NAMES)
def test_scales_are_known_under_every_name_and_reach_the_attention_layers(checkpoints, form):
    checkpoint, config = read_checkpoint(str(checkpoints / form)), QNextConfig.from_pretrained(checkpoints / form)
    checkpoint.check(config, "required")
    assert checkpoint.cache_scales.keys() == {f"{layer}.attn" for layer in LAYERS}
    tensors = load_file(checkpoints / form / "model.safetensors")
    UpdateCheck(config)(tensors.items())
    scales = {name: tensor.item() for name, tensor in for_attention(tensors.items()) if ".attn." in name}
    assert scales == {f"{layer}.attn.{x}_scale": scale(layer, x) for layer in LAYERS for x in NAMES[form]}


def test_other_names_are_no_scales():
    for name in (
        "model.layers.1.self_attn.k_proj.v_scale",
        "model.layers.1.self_attn.o_proj.output_scale",
        "model.layers.1.self_attn.k_norm.k_scale",
        "model.layers.1.mlp.gate.k_scale",
        "model.layers.1.self_attn.k_proj.weight_scale",
    ):
        assert cache_scale(name) is None, name


@pytest.mark.parametrize(
    ("added", "scheme", "words"),
    [
        ({"k": (2, 1, 1), "v": (2, 1, 1)}, TENSOR, r"k_scale BF16 \[2, 1, 1\], expected one floating-point number"),
        ({"k": (), "v": (3,)}, None, r"wrongly shaped 1: model.layers.1.self_attn.v_scale BF16 \[3\]"),
        ({"k": ()}, None, "k_scale found, expected one scale each for the keys and values"),
        ({"k": (), "v": ()}, TENSOR | {"strategy": "attn_head"}, "{'strategy': 'attn_head'} found, expected static"),
        ({"k": (), "v": ()}, TENSOR | {"type": "int", "symmetric": False}, "{'type': 'int', 'symmetric': False} found"),
    ],
)
def test_scales_of_another_format_are_refused(checkpoints, tmp_path, added, scheme, words):
    quantize_checkpoint(checkpoints / "source", tmp_path / "changed", format="fp8-channel")
    file = tmp_path / "changed" / "model.safetensors"
    new = {f"{LAYERS[0]}.{x}_scale": torch.ones(shape, dtype=torch.bfloat16) for x, shape in added.items()}
    save_file(load_file(file) | new, file)
    found = read_checkpoint(str(tmp_path / "changed"))
    quantization = dict(found.quantization) | ({} if scheme is None else {"kv_cache_scheme": scheme})
    with pytest.raises(ValueError, match=words):
        Checkpoint(found.config, found.headers, quantization).check(QNextConfig.from_dict(found.config))


def test_scales_without_a_quantization_and_numbers_that_are_none(checkpoints):
    found = read_checkpoint(str(checkpoints / "modelopt"))
    config = QNextConfig.from_dict(found.config)
    scales = {name: info for name, info in found.headers.items() if cache_scale(name)}
    with pytest.raises(ValueError, match=r"scales for a cache of keys and values .*has no quantization_config"):
        Checkpoint(found.config, read_headers(checkpoints / "source") | scales, None).check(config)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"k_scale is .*, expected more than 0"):
            dict(for_attention([(f"{LAYERS[0]}.k_scale", torch.tensor(value))]))
    with pytest.raises(RefusedUpdate, match="expected one floating-point number"):
        UpdateCheck(config)([(f"{LAYERS[0]}.k_scale", torch.ones(2))])


@pytest.mark.parametrize(
    ("quantization", "asks"),
    [
        (None, False),
        ({"quant_method": "fp8"}, False),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, True),
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}, False),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}, False),
        ({"quant_method": "modelopt"} | SETTINGS["modelopt"], True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": TENSOR}, True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": TENSOR | {"dynamic": True}}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": TENSOR | {"num_bits": 4}}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, False),
    ],
)
def test_what_asks_for_an_fp8_cache(quantization, asks):
    assert asks_for_fp8_cache(quantization) == asks
