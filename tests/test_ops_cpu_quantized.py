"""Products with packed quantized weights against float64, whichever rows go to whichever matrices."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from qnext_plugin.ops.cpu import decoded, packing, panels, quantized
from tests.support.packed import BFLOAT, EXPONENT, FORMS, FP8, IDS, dequantize, each_in_a_byte, pack, weights
from tests.support.tolerances import OPS, assert_close

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="wants AVX2")


def plain(form, codes, scales, zeros, outer):
    """Compute the weight in float64 from what the codes mean."""
    kind = packing.CODES[form.codes]
    if kind == "e2m1":
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[(codes & 7).long()]
        values = torch.where(codes >= 8, -values, values)
    else:
        values = codes.view({"u4": torch.uint8, "i8": torch.int8, "e4m3": FP8}[kind]).double()
    size = codes.shape[-1] // scales.shape[-1]
    default = torch.tensor(8.0 if kind == "u4" else 0.0).expand(scales.shape)
    values = values - (default if zeros is None else zeros).double().repeat_interleave(size, -1)
    factors = torch.exp2(scales.double() - 127) if scales.dtype == EXPONENT else scales.double()
    factors = factors if outer is None else factors * outer.double()[..., None]
    return values * factors.repeat_interleave(size, -1)


def bound(form, x, weight):
    """Return how far from a float64 product float32 sums of inputs rounded to int16 by part may be.

    For each part of a group that is 2**-16 of its largest input times the sum of its weights' magnitudes. Float32 sums
    add some units in the last place of the products' magnitudes.
    """
    magnitudes = x.abs() @ weight.abs().T * 2**-20
    if packing.CODES[form.codes] == "e4m3":
        return magnitudes
    size = panels.chunk_of(form)
    largest = [part.abs().amax(1, keepdim=True) for part in x.split(size, 1)]
    sums = [part.abs().sum(1)[None] for part in weight.split(size, 1)]
    # A zero point or half the range is added to the codes and subtracted after the sum.
    return magnitudes * 8 + sum(x * w for x, w in zip(largest, sums, strict=True)) * 2**-16


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill all memory that torch allocates with NaN, or the integers whose bits are NaN; leave AMX aside."""
    monkeypatch.setattr(quantized, "has_amx", lambda: False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(("batch", "n"), [((), 33), ((3,), 16), ((2, 2), 47)])
def test_packing_can_be_undone(form, batch, n):
    form, *parts = weights(*form, n, *batch)
    packed = pack(form, *parts)
    assert packed.shape == (*batch, *form.packed_shape(n)) and packed.dtype == torch.uint8
    codes, *rest = packing.unpack(form, packed, n)
    for found, expected in zip((each_in_a_byte(form, codes), *rest), parts, strict=True):
        assert (found is None) == (expected is None)
        assert expected is None or (found.dtype == expected.dtype and torch.equal(found.float(), expected.float()))
    assert_close(dequantize(form, packed, n), plain(form, *parts), OPS[torch.float32])


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("counts", [[], [0], [1], [2, 3], [4, 7], [12, 13], [1, 0, 5, 2, 101], [300]])
@pytest.mark.parametrize(("n", "num_threads"), [(33, 1), (160, 3)])
def test_products(form, counts, n, num_threads):
    form, *parts = weights(*form, n, 5)
    torch.manual_seed(n)
    x = torch.randn(29, form.k) * torch.rand(29, 1) * torch.logspace(-2, 2, form.k)
    x[3] = 0
    check(form, parts, x.bfloat16() if n == 33 else x, counts, n, num_threads)


def check(form, parts, x, counts, n, num_threads=2, packed=None):
    used, rows = [4, 2, 0, 1, 3][: len(counts)], torch.randint(len(x), (sum(counts),))
    weight = plain(form, *parts)
    packed = pack(form, *parts) if packed is None else packed
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        exact = quantized.products(form, x, packed, used, counts, rows, torch.float32)
        rounded = quantized.products(form, x, packed, used, counts, rows)
    finally:
        torch.set_num_threads(before)
    assert exact.shape == (sum(counts), packed.shape[-2] * packing.BLOCK)
    assert not exact[:, n:].any()
    assert torch.equal(rounded, exact.bfloat16())
    for part, found, i in zip(x[rows].double().split(counts), exact.split(counts), used, strict=True):
        error = (found[:, :n].double() - part @ weight[i].T).abs()
        assert bool((error <= bound(form, part, weight[i])).all()), f"matrix {i}: {error.max():.3g} off"


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(("n", "num_threads", "slices"), [(33, 1, 1), (160, 3, 3)])
def test_products_of_many_rows_where_there_is_amx(monkeypatch, form, n, num_threads, slices):
    """Few rows are multiplied as without; of many, inputs, weights and outputs are rounded to bfloat16."""
    form, *parts = weights(*form, n, 5)
    weight, packed = plain(form, *parts), pack(form, *parts)
    counts, used = [decoded.MANY - 1, decoded.MANY, 1, 101, 0], [4, 2, 0, 1, 3]
    rows, x = torch.randint(29, (sum(counts),)), torch.randn(29, form.k).bfloat16()
    without = quantized.products(form, x, packed, used, counts, rows)
    monkeypatch.setattr(quantized, "has_amx", lambda: True)
    monkeypatch.setattr(decoded, "SLICE", 2 * form.k * packing.BLOCK * -(-packed.shape[-2] // slices))
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    found = quantized.products(form, x, packed, used, counts, rows)
    several = [part.split(counts) for part in (found, without, x[rows])]
    for ours, others, part, i in zip(*several, used, strict=True):
        if len(part) < decoded.MANY:
            assert torch.equal(ours, others)
        expected = part.double() @ weight[i].T
        bound = (part.double().abs() @ weight[i].abs().T + expected.abs()) * 2**-8
        assert bool(((ours[:, :n].double() - expected).abs() <= bound * 1.01).all()), f"matrix {i}"


def swapped_nibbles(form, codes, scales, zeros, outer):
    codes[2, 5, 8:10] = codes[2, 5, 8:10].flip(0)


def next_groups_scale(form, codes, scales, zeros, outer):
    scales[2, 5, 0] = scales[2, 5, 1]


def zero_off_by_one(form, codes, scales, zeros, outer):
    zeros[2, 5, 1] += 1


def next_experts_codes(form, codes, scales, zeros, outer):
    codes[2] = codes[3].clone()


@pytest.mark.parametrize("mutant", [swapped_nibbles, next_groups_scale, zero_off_by_one, next_experts_codes])
@pytest.mark.parametrize("counts", [[2, 1], [20, 20]])
def test_what_is_wrong_in_one_place_is_noticed(mutant, counts):
    form, *parts = weights("u4", torch.float16, 192, 64, True, 33, 5)
    assert parts[0][2, 5, 8] != parts[0][2, 5, 9]
    x = torch.randn(29, form.k)
    check(form, parts, x, counts, 33)
    changed = [None if part is None else part.clone() for part in parts]
    mutant(form, *changed)
    with pytest.raises(AssertionError, match="matrix 2"):
        check(form, parts, x, counts, 33, packed=pack(form, *changed))


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(("count", "amx"), [(1, False), (3, False), (40, False), (50, True)])
def test_what_is_not_finite_is_not_hidden(monkeypatch, form, count, amx):
    monkeypatch.setattr(quantized, "has_amx", lambda: amx)
    form, *parts = weights(*form, 16)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(count, form.k)
        x[-1, form.k // 2] = value
        found = quantized.products(form, x, pack(form, *parts), dtype=torch.float32)
        assert bool(found[:-1].isfinite().all()) and not bool(found[-1].isfinite().any())


@pytest.mark.parametrize("rows", [1, 50])
def test_one_matrix_takes_all_rows_and_a_bias(rows):
    form, *parts = weights("u4", BFLOAT, 128, 64, False, 33)
    bias, x = torch.randn(33).bfloat16(), torch.randn(rows, 128).bfloat16()
    found = quantized.linear(form, x, pack(form, *parts), bias, 33)
    expected = torch.nn.functional.linear(x.double(), plain(form, *parts), bias.double())
    assert_close(found, expected, OPS[torch.bfloat16])


@pytest.fixture
def packed_experts():
    """Two forms, the packed weights of 7 experts, and what computes the result in float64."""
    hidden, intermediate, experts = 136, 40, 7
    form13, *parts13 = weights("u4", BFLOAT, hidden, hidden, False, 2 * intermediate, experts)
    form2, *parts2 = weights("e4m3", torch.float32, intermediate, intermediate, False, hidden, experts, seed=1)
    w13, w2 = plain(form13, *parts13), plain(form2, *parts2)

    def exact(x, topk_weights, ids):
        expected = torch.zeros(x.shape, dtype=torch.float64)
        for token, k in itertools.product(*map(range, ids.shape)):
            if (expert := ids[token, k]) >= 0:
                gate, up = (w13[expert] @ x[token].double()).chunk(2)
                expected[token] += topk_weights[token, k] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
        return expected

    return (form13, form2), pack(form13, *parts13), pack(form2, *parts2), exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("first", [0, 3, 7])  # of the experts on this rank
@pytest.mark.parametrize(
    ("num_tokens", "num_threads", "amx"), [(0, 2, False), (1, 3, False), (80, 2, False), (80, 2, True)]
)
def test_routed_experts(monkeypatch, packed_experts, num_tokens, num_threads, amx, first, dtype):
    forms, w13, w2, exact = packed_experts
    monkeypatch.setattr(quantized, "has_amx", lambda: amx)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    x = (3 * torch.randn(num_tokens, 136)).to(dtype)
    topk_weights, ids = torch.randn(num_tokens, 7).softmax(-1).topk(3)
    ids = torch.where(ids < first, -1, ids).int()
    found = quantized.experts(forms, x, w13, w2, topk_weights, ids)
    assert found.dtype == dtype and found.shape == x.shape
    assert_close(found, exact(x, topk_weights, ids), OPS[torch.bfloat16])


def test_experts_hide_nothing_that_is_not_finite(packed_experts):
    forms, w13, w2, _ = packed_experts
    topk_weights, ids = torch.full((3, 2), 0.5), torch.tensor([[0, 1], [1, 2], [2, 0]])
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 136)
        x[1, 60] = value
        found = quantized.experts(forms, x, w13, w2, topk_weights, ids)
        assert bool(found[::2].isfinite().all()) and not bool(found[1].isfinite().any())


@pytest.mark.parametrize("size", [0.1, 30, 95, 1e30])
def test_silu_of_numbers_of_any_size(size):
    one = torch.tensor(1.0).to(FP8).view(torch.uint8)
    form13, form2 = (packing.form("e4m3", torch.float32, k, k) for k in (32, 16))
    w13, w2 = (pack(form, torch.eye(32, form.k).byte() * one, torch.ones(32, 1))[None] for form in (form13, form2))
    gates = torch.linspace(-size, size, 51)[:, None]
    x = torch.cat([gates.expand(-1, 16), torch.ones(51, 16)], 1)
    found = quantized.experts((form13, form2), x, w13, w2, torch.ones(51, 1), torch.zeros(51, 1, dtype=torch.int32))
    expected = torch.nn.functional.silu(gates.double())
    error = (found[:, :16] - expected).abs()
    assert bool((error <= 2**-8 * expected.abs() + 1e-36).all()), error.max()


def test_nan_in_a_checkpoint_is_refused():
    form, codes, *rest = weights("e4m3", torch.float32, 128, 128, False, 16)
    codes[3, 7] = 0xFF
    with pytest.raises(ValueError, match="damaged"):
        pack(form, codes, *rest)


def test_groups_are_whole_lines():
    with pytest.raises(ValueError, match="multiple of 8"):
        packing.form("u4", BFLOAT, 120, 12)


@pytest.mark.exhaustive
@pytest.mark.skipif(os.environ.get("NUMBA_CPU_NAME") is not None, reason="is what this test starts")
def test_with_the_instructions_of_avx2_alone():
    """On a CPU that has more, all of the above again with what LLVM makes for an older one."""
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+popcnt"
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
