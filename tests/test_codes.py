"""Weights of every published format as codes are the weights that their decoder computes."""

import pytest
import torch

from qnext_plugin.checkpoint.codes import PER_BYTE, coded
from qnext_plugin.checkpoint.formats import dequantize
from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.ops.cpu import packer, packing
from tests.support.packed import dequantize as of_packed


def served(tensors, config):
    """The weight from its packed form, as products multiply it."""
    found = coded(tensors, config)
    n, k = len(found.codes), PER_BYTE[found.kind] * found.codes.shape[1]
    form = packing.form(found.kind, found.scales.dtype, k, found.group, found.zeros is not None)
    return of_packed(form, packer.pack(form, found.codes, found.scales, found.zeros, found.outer), n)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (48, 384)])
def test_every_format_is_packed_without_rounding(name, rows, columns):
    torch.manual_seed(rows)
    written = FORMATS[name]
    weight = torch.randn(rows, columns).bfloat16() * torch.rand(rows, 1).bfloat16()
    scheme = written.scheme(32)
    tensors, config = written.leaves(weight, scheme), written.config(scheme, [])
    expected = dequantize(tensors, config)
    assert (expected - weight).abs().max() < 1  # it is this weight
    found = served(tensors, config)
    if "weight_global_scale" in tensors:  # it divides there, and its reciprocal multiplies here
        torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (64, 4), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_by_tensor_row_group_and_block(shape, dtype):
    tensors = {"weight": torch.randn(64, 128).to(dtype), "weight_scale": torch.rand(shape)}
    if dtype == torch.int8 and shape == (64, 4):
        tensors["weight_zero_point"] = torch.randint(-9, 9, shape).to(torch.int8)
    assert torch.equal(served(tensors, {}), dequantize(tensors, {}))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_words", [False, True])
def test_zero_points_of_integers(bits, in_words):
    generator = torch.Generator().manual_seed(bits)
    words, high = torch.iinfo(torch.int32), 2 ** (bits - 1)
    tensors = {
        "weight_packed": torch.randint(words.min, words.max, (32, 128 * bits // 32), generator=generator).int(),
        "weight_shape": torch.tensor([32, 128]),
        "weight_scale": torch.rand(32, 4, generator=generator),
        "weight_zero_point": torch.randint(-high, high, (32, 4), generator=generator).to(torch.int8),
        "weight_g_idx": torch.arange(128).int() // 32,
    }
    if in_words:
        packed = torch.randint(words.min, words.max, (32 * bits // 32, 4), generator=generator)
        tensors["weight_zero_point"] = packed.int()
    assert torch.equal(served(tensors, {}), dequantize(tensors, {}))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_words_of_gptq(bits, form):
    words = torch.iinfo(torch.int32)
    tensors = {
        "qweight": torch.randint(words.min, words.max, (128 * bits // 32, 64)).int(),
        "qzeros": torch.randint(words.min, words.max, (4, 64 * bits // 32)).int(),
        "scales": torch.rand(4, 64).half(),
    }
    config = {"checkpoint_format": form}
    assert torch.equal(served(tensors, config), dequantize(tensors, config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"g_idx": torch.arange(128).int().flip(0) // 32}, "groups are not of consecutive inputs"),
        ({"qweight": torch.zeros(8, 64).int(), "qzeros": torch.zeros(4, 4).int()}, "it has 2 bits"),
        ({"scales": torch.rand(5, 64).half(), "qzeros": torch.zeros(5, 8).int()}, "shorter than the others"),
    ],
)
def test_what_has_no_such_form_is_refused(change, words):
    tensors = {"qweight": torch.zeros(16, 64).int(), "qzeros": torch.zeros(4, 8).int(), "scales": torch.rand(4, 64)}
    with pytest.raises(ValueError, match=words):
        coded(tensors | change, {})


def test_blocks_of_a_part_and_other_zero_points_are_refused():
    weight = torch.randn(64, 200).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="no multiple"):
        coded({"weight": weight, "weight_scale_inv": torch.rand(1, 2)}, {})
    with pytest.raises(ValueError, match="zero points other than 0"):
        coded({"weight": weight, "weight_scale": torch.rand(64), "weight_zero_point": torch.ones(64)}, {})
