"""Grouped and flat row orders, for every quantized tensor that carries them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext_plugin.checkpoint.layouts import (
    LAYOUTS,
    can_ungroup,
    inverse_row_order,
    regroup,
    row_order,
    section_sizes,
    ungroup,
)
from qnext_plugin.config import GatedDeltaNetDims

KINDS = ("qkvz", "ba")
UNALIGNED = GatedDeltaNetDims(num_k_heads=4, num_v_heads=12, head_k_dim=5, head_v_dim=6)  # no segment fills a word
ALIGNED = GatedDeltaNetDims(num_k_heads=2, num_v_heads=16, head_k_dim=8, head_v_dim=16)  # every segment fills words
BLOCKS = GatedDeltaNetDims(num_k_heads=2, num_v_heads=6, head_k_dim=128, head_v_dim=256)  # every segment fills blocks

small_dims = st.builds(
    lambda k, ratio, head_k_dim, head_v_dim: GatedDeltaNetDims(k, k * ratio, head_k_dim, head_v_dim),
    *(st.integers(1, n) for n in (5, 4, 6, 6)),
)


def row_names(dims, kind):
    """(grouped, flat): what each row is, as (section, head, index within the head)."""
    ratio = dims.num_v_heads // dims.num_k_heads

    def head_rows(section, head):
        width = {"q": dims.head_k_dim, "k": dims.head_k_dim, "v": dims.head_v_dim, "z": dims.head_v_dim}.get(section, 1)
        return [(section, head, i) for i in range(width)]

    grouped, flat = [], []
    for group in range(dims.num_k_heads):
        for section in kind:
            heads = [group] if section in "qk" else range(group * ratio, (group + 1) * ratio)
            for head in heads:
                grouped += head_rows(section, head)
    for section in kind:
        for head in range(dims.num_k_heads if section in "qk" else dims.num_v_heads):
            flat += head_rows(section, head)
    return grouped, flat


def expected_order(dims, kind):
    grouped, flat = row_names(dims, kind)
    position = {name: i for i, name in enumerate(grouped)}
    return torch.tensor([position[name] for name in flat])


@settings(deadline=None)
@given(small_dims, st.sampled_from(KINDS))
def test_rows_are_ordered_by_section_then_head(dims, kind):
    grouped, flat = row_names(dims, kind)
    assert [grouped[i] for i in row_order(dims, kind)] == flat
    assert [flat[i] for i in inverse_row_order(dims, kind)] == grouped
    sections = [name[0] for name in flat]
    assert section_sizes(dims, kind) == tuple(sections.count(section) for section in kind)


@settings(deadline=None)
@given(small_dims, st.sampled_from((1, 3, 8)))
def test_a_granule_moves_whole(dims, granularity):
    scaled = GatedDeltaNetDims(
        dims.num_k_heads, dims.num_v_heads, dims.head_k_dim * granularity, dims.head_v_dim * granularity
    )
    granules = row_order(scaled, "qkvz", granularity)
    rows = granules[:, None] * granularity + torch.arange(granularity)
    assert torch.equal(rows.flatten(), row_order(scaled, "qkvz"))


@pytest.mark.parametrize("kind, granularity", [("qkvz", 4), ("qkvz", 128), ("ba", 2)])
def test_a_segment_that_is_not_whole_granules_is_refused(kind, granularity):
    for order in (row_order, inverse_row_order):
        with pytest.raises(ValueError, match=rf"in_proj_{kind}: found \[.*multiples of {granularity}.*dequantize"):
            order(UNALIGNED, kind, granularity)


@pytest.mark.parametrize("ratio", (1, 2, 3, 4))
@pytest.mark.parametrize("tp_size", (1, 2, 4, 8, 16))
@pytest.mark.parametrize("kind", KINDS)
def test_sharding_flat_sections_is_flattening_a_shard_of_groups(kind, tp_size, ratio):
    dims = GatedDeltaNetDims(num_k_heads=16, num_v_heads=16 * ratio, head_k_dim=3, head_v_dim=5)
    grouped = torch.arange(sum(section_sizes(dims, kind)))[:, None]
    flat = ungroup(grouped, dims, kind, "weight").split(section_sizes(dims, kind))
    for rank in range(tp_size):
        merged_column_parallel = torch.cat([section.chunk(tp_size)[rank] for section in flat])
        groups = grouped.chunk(tp_size)[rank]
        assert torch.equal(merged_column_parallel, ungroup(groups, dims.shard(tp_size), kind, "weight"))


def pack(values, bits, positions):
    """Independent packer: int [..., n] to int32 [..., n / (32 / bits)]; element j of a word sits at positions[j]."""
    per_word = 32 // bits
    words = []
    for row in values.tolist():
        word_values = [row[i : i + per_word] for i in range(0, len(row), per_word)]
        unsigned = [sum(v << bits * positions[j] for j, v in enumerate(word)) for word in word_values]
        words.append([u - 2**32 if u >= 2**31 else u for u in unsigned])
    return torch.tensor(words, dtype=torch.int32)


AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
IN_ORDER = range(8)


def rows_as(dtype, *trailing):
    return lambda values: values.to(torch.float32).to(dtype).unflatten(1, trailing or (-1,))


# How each tensor of row data is stored, given values in 0..15 of shape [rows, 6].
STORED = {
    "weight": [rows_as(torch.bfloat16), rows_as(torch.float8_e4m3fn), rows_as(torch.uint8)],
    "bias": [lambda values: values[:, 0].half()],
    "lora_B.weight": [rows_as(torch.float32)],
    "weight_packed": [lambda values: values.int()],
    "weight_scale": [
        lambda values: values[:, 0].float(),
        lambda values: values[:, :1].float(),
        rows_as(torch.float8_e4m3fn),
    ],
    "scales": [lambda values: values.T.half()],
    "qweight": [lambda values: values.T.int()],
    "weight_zero_point": [rows_as(torch.int8)],
}
# The same, several rows to an int32.
PACKED = {
    "qzeros": [
        lambda values: pack(values.T, 4, IN_ORDER),
        lambda values: pack(values.T, 8, IN_ORDER),
        lambda values: pack(values.T, 4, AWQ),
    ],
    "qweight": [lambda values: pack(values.T, 4, AWQ)],
    "weight_zero_point": [
        lambda values: pack(values.T, 4, IN_ORDER).T,
        lambda values: pack(values.T, 8, IN_ORDER).T,
    ],
}
UNCHANGED = {
    "lora_A.weight": (3, 6),
    "g_idx": (6,),
    "weight_g_idx": (6,),
    "weight_shape": (2,),
    "weight_scale_2": (),
    "weight_global_scale": (1,),
    "input_scale": (1,),
    "input_zero_point": (1,),
    "input_global_scale": (1,),
}


def check_moves(store, dims, kind, suffix):
    values = torch.randint(16, (sum(section_sizes(dims, kind)), 6), generator=torch.Generator().manual_seed(0))
    grouped, flat = store(values), store(values[expected_order(dims, kind)])
    before = grouped.clone()
    assert can_ungroup({suffix: tuple(grouped.shape)}, dims, kind)
    for _ in range(2):  # the second is a reload of the same checkpoint tensor
        actual = ungroup(grouped, dims, kind, suffix)
        assert actual.dtype == flat.dtype
        assert actual.is_contiguous()
        assert torch.equal(actual.double(), flat.double())
    assert torch.equal(grouped.double(), before.double())
    assert torch.equal(regroup(actual, dims, kind, suffix).double(), grouped.double())


@pytest.mark.parametrize("suffix", STORED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", (UNALIGNED, ALIGNED), ids=("unaligned", "aligned"))
def test_every_stored_tensor_moves_with_its_rows(dims, kind, suffix):
    for store in STORED[suffix]:
        check_moves(store, dims, kind, suffix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", PACKED)
def test_packed_words_move_whole(kind, suffix):
    for store in PACKED[suffix]:
        check_moves(store, ALIGNED, kind, suffix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", PACKED)
def test_packed_words_that_straddle_sections_are_refused(kind, suffix):
    for store in PACKED[suffix]:
        words = store(torch.zeros(sum(section_sizes(UNALIGNED, kind)), 6, dtype=torch.int64))
        assert not can_ungroup({suffix: tuple(words.shape)}, UNALIGNED, kind)
        with pytest.raises(ValueError, match=f"in_proj_{kind}: found .*expected multiples of .*dequantize it first"):
            ungroup(words, UNALIGNED, kind, suffix)


def test_every_suffix_is_tested():
    assert LAYOUTS.keys() - STORED.keys() - PACKED.keys() - UNCHANGED.keys() == {"weight_scale_inv"}


@pytest.mark.parametrize("suffix", UNCHANGED)
def test_tensors_without_rows_are_returned_as_they_are(suffix):
    tensor = torch.ones(UNCHANGED[suffix])
    assert ungroup(tensor, UNALIGNED, "ba", suffix) is tensor
    assert regroup(tensor, UNALIGNED, "ba", suffix) is tensor


@pytest.mark.parametrize("shape", ((), (1,)))
def test_a_per_tensor_weight_scale_is_returned_as_it_is(shape):
    scale = torch.ones(shape)
    assert ungroup(scale, UNALIGNED, "qkvz", "weight_scale") is scale


@pytest.mark.parametrize(
    "suffix, scale_shape", [("weight_scale_inv", (28, 2)), ("weight_scale", (28, 2)), ("weight_scale", (28, 1, 2, 1))]
)
def test_fp8_blocks_dequantize_to_the_permuted_weight(suffix, scale_shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3584, 256, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape, generator=generator)

    def dequantize(weight, scale):
        blocks = scale.reshape(28, 2).repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight.float() * blocks

    flat_weight = ungroup(weight, BLOCKS, "qkvz", "weight")
    flat_scale = ungroup(scale, BLOCKS, "qkvz", suffix)
    expected = dequantize(weight, scale)[expected_order(BLOCKS, "qkvz")]
    assert torch.equal(dequantize(flat_weight, flat_scale), expected)
    assert torch.equal(regroup(flat_scale, BLOCKS, "qkvz", suffix), scale)


@pytest.mark.parametrize(
    "dims, kind, scale_rows",
    [
        (BLOCKS, "ba", 1),
        (GatedDeltaNetDims(num_k_heads=16, num_v_heads=64, head_k_dim=128, head_v_dim=128), "ba", 1),
        (GatedDeltaNetDims(num_k_heads=2, num_v_heads=4, head_k_dim=64, head_v_dim=128), "qkvz", 10),
        (UNALIGNED, "qkvz", 2),
    ],
)
def test_fp8_blocks_that_straddle_sections_are_refused(dims, kind, scale_rows):
    assert not can_ungroup({"weight_scale_inv": (scale_rows, 2)}, dims, kind)
    with pytest.raises(ValueError, match=rf"in_proj_{kind}: .*multiples of 128.*dequantize it first"):
        ungroup(torch.ones(scale_rows, 2), dims, kind, "weight_scale_inv")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'absmax', expected one of .*'weight_scale_inv'"):
        ungroup(torch.ones(24, 2), UNALIGNED, "ba", "absmax")


@pytest.mark.parametrize(
    "suffix, shape, dtype, found",
    [
        ("weight", (23, 2), torch.float32, r"found shape \[23, 2\], expected 24 along axis 0"),
        ("weight", (1,), torch.float32, r"found shape \[1\], expected 24 along axis 0"),
        ("scales", (24,), torch.half, r"found shape \[24\], expected 24 along axis 1"),
        ("weight_scale", (2, 1), torch.float32, r"found shape \[2, 1\], expected 24 or 1 along axis 0"),
        ("qweight", (2, 6), torch.int32, r"found shape \[2, 6\], expected 24 or 3 along axis 1"),
        ("qzeros", (2, 5), torch.int32, r"found shape \[2, 5\], expected 6 or 3 or 2 along axis 1"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(suffix, shape, dtype, found):
    with pytest.raises(ValueError, match=rf"in_proj_ba\.{suffix}: {found}"):
        ungroup(torch.zeros(shape, dtype=dtype), UNALIGNED, "ba", suffix)
