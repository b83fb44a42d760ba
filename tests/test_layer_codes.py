"""Codes: each stored format gives the weights that it decodes to, whole and by rank, or is refused with a reason."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qnext_plugin.checkpoint.formats import dequantize
from qnext_plugin.checkpoint.headers import describe, read_headers
from qnext_plugin.checkpoint.layer_codes import Codes, common, stored_codes, to_codes
from qnext_plugin.checkpoint.make_quantized import quantize_checkpoint
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.quantization import is_quantized, stored_modules
from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.ops.cpu import stored
from tests.support.packed import dequantize as of_packed

SIZES = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 8,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_attention_heads": 4,
    "head_dim": 64,
}
EXPERT = "model.layers.0.mlp.experts.1.down_proj"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    write_random_checkpoint(root / "source", overrides=SIZES)
    for name in FORMATS:
        quantize_checkpoint(root / "source", root / name, format=name, ignore=r".*\.shared_expert_gate")
    return root


def modules(directory):
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    for module, leaves in stored_modules(read_headers(directory)).items():
        if is_quantized(leaves) and not re.search(r"experts\.[2-7]\.", module):  # which are like the first two
            yield module, {leaf: tensors[f"{module}.{leaf}"] for leaf in leaves}, config


def headers(tensors):
    return {leaf: describe(tensor) for leaf, tensor in tensors.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_weights_that_it_decodes_to(quantized, name, ranks):
    count = 0
    for module, tensors, config in modules(quantized / name):
        expected = dequantize(tensors, config)
        rows, columns = expected.shape
        codes = stored_codes(headers(tensors), (rows, columns), config, ranks)
        leaves = to_codes(tensors, codes, config)
        each = columns // ranks
        for rank in range(ranks):  # each takes its part of the inputs, as the engines' loaders do
            share = {
                leaf: t if t.shape[1] == 1 and leaf == "weight_scale_2" else t.chunk(ranks, 1)[rank].contiguous()
                for leaf, t in leaves.items()
            }
            assert {k: t.shape for k, t in share.items()} == {k: t.shape for k, t in codes.zeros(rows, each).items()}
            form, packed = stored.pack(codes, share)
            part = expected[:, rank * each : (rank + 1) * each]
            torch.testing.assert_close(of_packed(form, packed, rows), part, rtol=1e-6, atol=0, msg=module)
            again = stored.unpack(form, packed, rows)
            assert again.keys() == share.keys()
            for leaf, tensor in share.items():
                assert torch.equal(again[leaf].float(), tensor.float()), (module, leaf)
        count += 1
    assert count > 40


def test_several_matrices_are_packed_as_each_of_them(quantized):
    found = [
        to_codes(tensors, stored_codes(headers(tensors), (256, 128), config), config)
        for module, tensors, config in modules(quantized / "awq")
        if module.endswith(".down_proj") and ".0.mlp.experts." in module
    ]
    codes = Codes("u4", torch.float16, 32, has_zero_point=True)
    together = {leaf: torch.stack([leaves[leaf] for leaves in found]) for leaf in found[0]}
    form, packed = stored.pack(codes, together)
    for i, leaves in enumerate(found):
        assert torch.equal(packed[i], stored.pack(codes, leaves)[1])
    assert (form.k, form.group, len(packed)) == (128, 32, len(found))


def test_resident_bytes_are_those_of_the_checkpoint(quantized):
    """Rounded up to whole lines, which matters only for small matrices."""
    for name in FORMATS:
        for module, tensors, config in modules(quantized / name):
            if module.endswith("in_proj_qkvz"):
                codes = stored_codes(headers(tensors), (768, 256), config)
                _, packed = stored.pack(codes, to_codes(tensors, codes, config))
                held = sum(tensor.nbytes for tensor in tensors.values())
                assert packed.nbytes <= 1.07 * held, (name, packed.nbytes, held)


def gptq(**changes):
    """A symmetric weight [16, 64] of GPTQ in groups of 32, and its configuration."""
    values = torch.randint(-(2**31), 2**31 - 1, (8, 16), dtype=torch.int32)
    tensors = {
        "qweight": values,
        "qzeros": torch.full((2, 2), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(2, 16).half(),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }
    return tensors | changes, {"quant_method": "gptq", "sym": True}


def test_zero_points_that_are_all_in_the_middle_are_not_held():
    tensors, config = gptq()
    codes = stored_codes(headers(tensors), (16, 64), config)
    assert codes == Codes("u4", torch.float16, 32)
    form, packed = stored.pack(codes, to_codes(tensors, codes, config))
    assert torch.equal(of_packed(form, packed, 16), dequantize(tensors, config))
    other = stored_codes(headers(tensors), (16, 64), {**config, "sym": False})
    assert other == replace(codes, has_zero_point=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": torch.full((2, 2), 0x77677777, dtype=torch.int32)}, "zero points are not all in the middle"),
        ({"g_idx": torch.arange(64, dtype=torch.int32) % 2}, "groups are not of consecutive inputs"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(changes, message):
    tensors, config = gptq(**changes)
    with pytest.raises(ValueError, match=message):
        to_codes(tensors, stored_codes(headers(tensors), (16, 64), config), config)


def test_weights_in_another_format_are_refused(quantized):
    found = {name: next(modules(quantized / name)) for name in ("w4a16", "fp8-channel")}
    _, tensors, config = found["w4a16"]
    codes = stored_codes(headers(tensors), dequantize(tensors, config).shape, config)
    _, others, config = found["fp8-channel"]
    with pytest.raises(ValueError, match="weights found as e4m3"):
        to_codes(others, codes, config)


@pytest.mark.parametrize(
    ("config", "shape", "ranks", "message"),
    [
        ({"desc_act": True}, (16, 64), 1, "its groups are not of consecutive inputs"),
        ({}, (16, 64), 3, "3 ranks cannot split its inputs"),
        ({}, (16, 128), 1, "it has 2 bits"),
    ],
)
def test_what_the_products_cannot_take(config, shape, ranks, message):
    tensors, _ = gptq()
    with pytest.raises(ValueError, match=message):
        stored_codes(headers(tensors), shape, config, ranks)


def test_parts_of_one_layer_have_to_agree():
    one = Codes("u4", torch.bfloat16, 64)
    assert common([one, replace(one, group=96)]) == replace(one, group=32)
    for other in (replace(one, kind="i8"), replace(one, scale=torch.float16), replace(one, has_zero_point=True)):
        with pytest.raises(ValueError, match="its parts are stored in different ways"):
            common([one, other])
