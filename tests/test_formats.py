"""What a stored format may look like, and that each is decoded as its library defines."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, pack_to_int32
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext_plugin.checkpoint.formats import dequantize
from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.quantization import check_quantization


def meaning(change, name="w4a16", config=None):
    """What the check says of `in_proj_qkvz` of 64 rows and 96 inputs in a format, with changed headers."""
    leaves = {
        "w4a16": {"weight_packed": ("I32", 64, 12), "weight_shape": ("I64", 2), "weight_scale": ("BF16", 64, 3)},
        "fp8": {"weight": ("F8_E4M3", 64, 96), "weight_scale": ("F32", 64, 1)},
        "mxfp8": {"weight": ("F8_E4M3", 64, 96), "weight_scale": ("U8", 64, 3)},
        "mxfp4": {"weight_packed": ("U8", 64, 48), "weight_scale": ("U8", 64, 3)},
        "nvfp4": {"weight": ("U8", 64, 48), "weight_scale": ("F8_E4M3", 64, 6), "weight_scale_2": ("F32",)},
        "gptq": {"qweight": ("I32", 12, 64), "scales": ("F16", 3, 64), "qzeros": ("I32", 3, 8)},
        "awq": {"qweight": ("I32", 96, 8), "scales": ("F16", 3, 64), "qzeros": ("I32", 3, 8)},
    }[name] | change
    headers = {
        f"m.{leaf}": TensorInfo(tuple(shape), dtype, Path())
        for leaf, (dtype, *shape) in ((leaf, how) for leaf, how in leaves.items() if how)
    }
    check_quantization(headers, {"quant_method": name} | (config or {}), {"m.weight": (64, 96)})


@pytest.mark.parametrize("name", ["w4a16", "fp8", "mxfp8", "mxfp4", "nvfp4", "gptq", "awq"])
def test_headers_of_a_known_format_are_accepted(name):
    meaning({}, name)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("w4a16", {"weight_scale": ("U8", 64, 3)}, "weight_scale is U8, expected F64 or F32"),
        ("w4a16", {"weight_scale": ("BF16", 64, 5)}, r"weight_scale is \[64, 5\] for a weight of \[64, 96\]"),
        ("w4a16", {"weight_zero_point": ("F32", 64, 3)}, "weight_zero_point is F32, expected I32 or I8"),
        ("w4a16", {"weight_zero_point": ("I32", 64, 3)}, r"weight_zero_point is \[64, 3\] .*expected \[8, 3\]"),
        ("w4a16", {"weight_packed": ("I32", 64, 9)}, r"weight_packed is \[64, 9\] .*expected \[64, 12\] or \[64, 24\]"),
        ("w4a16", {"weight_shape": None}, "weight_shape is missing"),
        ("fp8", {"weight": ("F8_E5M2", 64, 96)}, "weight is F8_E5M2, which no known format has"),
        ("fp8", {"weight": ("I32", 64, 12)}, "weight is I32, which no known format has"),
        ("fp8", {"weight_scale": ("I8", 64, 1)}, "weight_scale is I8, expected"),
        ("fp8", {"weight_scale": ("F32", 4, 1)}, r"weight_scale is \[4, 1\]"),
        ("fp8", {"weight_scale_2": ("F32",)}, "weight_scale_2 does not belong to (fp8|mxfp4)"),
        ("mxfp8", {"weight_scale": ("U8", 64, 6)}, r"weight_scale is \[64, 6\] .*expected \[64, 3\]"),
        ("mxfp4", {"weight_scale": ("BF16", 64, 3)}, "weight_scale is BF16, expected U8 or F8_E8M0"),
        ("nvfp4", {"weight_scale": ("U8", 64, 6)}, "weight_scale_2 does not belong to (fp8|mxfp4)"),
        ("nvfp4", {"weight_scale": ("F8_E4M3", 64, 3)}, r"weight_scale is \[64, 3\] .*expected \[64, 6\]"),
        ("nvfp4", {"weight_scale_2": None}, "weight_global_scale is missing"),
        ("gptq", {"scales": ("F16", 7, 64)}, r"scales is \[7, 64\] .*expected whole groups and words"),
        ("gptq", {"qweight": ("I32", 9, 64)}, r"qweight is \[9, 64\]"),  # three bits
        ("gptq", {"qzeros": ("I32", 3, 16)}, r"qzeros is \[3, 16\] .*expected \[3, 8\]"),
        ("awq", {"scales": ("F16",)}, "have too few dimensions"),
        ("awq", {"qweight": ("I32", 64, 12)}, r"qweight is \[64, 12\]"),  # as its GEMV kernel wants it
    ],
)
def test_a_tensor_that_its_format_does_not_have_is_refused_by_name(name, change, words):
    with pytest.raises(ValueError, match=f"format that is not known:\n.*{words}.*: 1: m\n"):
        meaning(change, name)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gptq", {"packing_format": "auto_round:exllama"}, "packing format of GPTQ is 'auto_round:exllama'"),
        ("gptq", {"checkpoint_format": "marlin"}, "packing format of GPTQ is 'marlin', expected one of gptq"),
        ("mxfp4", {"transform_config": {"config_groups": {"R1": {}}}}, "hidden states have to be transformed"),
    ],
)
def test_a_configuration_of_another_meaning_is_refused(name, config, words):
    with pytest.raises(ValueError, match=words):
        meaning({}, name, config)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["w4a16", "fp8", "mxfp8", "mxfp4", "nvfp4", "gptq", "awq"]),
    st.dictionaries(
        st.sampled_from(
            ["weight", "weight_packed", "qweight", "weight_scale", "scales", "qzeros", "weight_zero_point"]
        ),
        st.tuples(
            st.sampled_from(["I32", "U8", "F16", "F8_E4M3"]), st.lists(st.sampled_from([0, 1, 8, 64, 96]), max_size=3)
        ),
        min_size=1,
        max_size=2,
    ),
)
def test_any_headers_are_accepted_or_refused_in_words(name, changes):
    with suppress(ValueError):
        meaning({leaf: (dtype, *shape) for leaf, (dtype, shape) in changes.items()}, name)


sizes = st.tuples(st.integers(1, 6).map(lambda n: 8 * n), st.sampled_from((32, 64, 96, 160)))


@settings(deadline=None, max_examples=60)
@given(sizes, st.sampled_from((4, 8)), st.sampled_from((8, 16, 32)), st.booleans(), st.integers(0, 2**32))
def test_words_decode_as_their_libraries_define(size, bits, group, in_order, seed):
    """GPTQ's and compressed-tensors' integers, with groups of inputs in any order."""
    (rows, inputs), generator = size, torch.Generator().manual_seed(seed)
    groups, high = inputs // group, 2**bits
    values = torch.randint(0, high, (rows, inputs), generator=generator)
    zeros = torch.randint(0, high, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).bfloat16()
    order = torch.arange(inputs) // group
    order = order if in_order else order[torch.randperm(inputs, generator=generator)]
    expected = (values - zeros[:, order]).float() * scales.float()[:, order]
    middle = high // 2
    tensors = {
        "weight_packed": pack_to_int32((values - middle).to(torch.int8), bits),
        "weight_shape": torch.tensor([rows, inputs]),
        "weight_scale": scales,
        "weight_zero_point": pack_to_int32((zeros - middle).to(torch.int8), bits, packed_dim=0).contiguous(),
        "weight_g_idx": order.int(),
    }
    assert torch.equal(dequantize(tensors, {}), expected)
    in_bytes = tensors | {"weight_zero_point": (zeros - middle).to(torch.int8)}
    assert torch.equal(dequantize(in_bytes, {}), expected)
    if in_order:
        del tensors["weight_g_idx"]
        assert torch.equal(dequantize(tensors, {}), expected)
    for minus, form in ((1, "gptq"), (0, "gptq_v2")):
        stored = (zeros - minus) % high - middle
        gptq = {
            "qweight": pack_to_int32((values - middle).T.contiguous().to(torch.int8), bits, packed_dim=0).contiguous(),
            "qzeros": pack_to_int32(stored.T.contiguous().to(torch.int8), bits),
            "scales": scales.T,
            "g_idx": order.int(),
        }
        assert torch.equal(dequantize(gptq, {"checkpoint_format": form}), expected)


@settings(deadline=None, max_examples=60)
@given(
    sizes, st.sampled_from(("MXFP4", "MXFP8")), st.sampled_from((torch.uint8, torch.float8_e8m0fnu)), st.integers(0, 99)
)
def test_exponents_decode_as_compressed_tensors_decompresses_them(size, preset, dtype, seed):
    (rows, inputs), generator = size, torch.Generator().manual_seed(seed)
    exponents = torch.randint(100, 150, (rows, inputs // 32), generator=generator, dtype=torch.uint8)
    if preset == "MXFP4":
        weight = {"weight_packed": torch.randint(0, 256, (rows, inputs // 2), generator=generator, dtype=torch.uint8)}
        library = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    else:
        weight = {"weight": torch.randn(rows, inputs, generator=generator).to(torch.float8_e4m3fn)}
        library = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    expected = library.decompress(weight | {"weight_scale": exponents}, scheme)["weight"].float()
    assert torch.equal(dequantize(weight | {"weight_scale": exponents.view(dtype)}, {}), expected)


def test_a_zero_point_out_of_its_range_is_refused():
    tensors = {
        "weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "weight_shape": torch.tensor([8, 32]),
        "weight_scale": torch.ones(8, 1),
        "weight_zero_point": torch.full((8, 1), 9, dtype=torch.int8),
    }
    with pytest.raises(ValueError, match="a weight of 4 bits has a zero point out of its range"):
        dequantize(tensors, {})
