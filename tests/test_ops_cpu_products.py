"""Products with packed bfloat16 weights are those with plain ones, whichever rows go to whichever matrices."""

import pytest
import torch

from qnext_plugin.ops.cpu import gemm_avx2
from tests.support.tolerances import OPS, assert_close

pytestmark = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="wants AVX2")


@pytest.mark.parametrize("shape", [(33, 70), (3, 16, 2), (2, 5, 160, 96)])
def test_packing_can_be_undone(shape):
    plain = torch.randn(shape).bfloat16()
    packed = gemm_avx2.pack(plain)
    assert packed.shape == (*shape[:-2], -(-shape[-2] // 16) * 16, shape[-1])
    assert torch.equal(gemm_avx2.unpack(packed, shape[-2]), plain)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("counts", [[], [0], [1], [6], [7], [0, 3], [1, 0, 13, 2, 101]])
@pytest.mark.parametrize(("n", "k"), [(16, 2), (33, 70), (160, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products(n, k, counts, num_threads, dtype):
    torch.manual_seed(n)
    weights, x = torch.randn(5, n, k).bfloat16(), torch.randn(29, k + 6).to(dtype)[:, :k]
    used, rows = [4, 2, 0, 1, 3][: len(counts)], torch.randint(len(x), (sum(counts),))
    parts = zip(x[rows].double().split(counts) if counts else (), used, strict=True)
    expected = torch.cat([torch.empty(0, n).double(), *(part @ weights[i].double().T for part, i in parts)])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        packed = gemm_avx2.pack(weights)
        exact = gemm_avx2.products(x, packed, used, counts, rows, torch.float32)
        rounded = gemm_avx2.products(x, packed, used, counts, rows)
    finally:
        torch.set_num_threads(before)
    assert not exact[:, n:].any()
    assert_close(exact[:, :n], expected, OPS[torch.float32])
    assert torch.equal(rounded, exact.bfloat16())


def test_one_matrix_takes_all_rows_and_a_bias():
    weight, bias, x = torch.randn(33, 70).bfloat16(), torch.randn(33).bfloat16(), torch.randn(50, 70).bfloat16()
    found = gemm_avx2.linear(x, gemm_avx2.pack(weight), bias, 33)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_close(found, expected, OPS[torch.bfloat16])


def test_rounding_is_that_of_torch_also_of_what_is_not_finite():
    values = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895e38, 3.4028e38, 1e-40, float("inf")]
    x = torch.tensor([*values, -float("inf"), float("nan")])[:, None] * torch.tensor([[1.0, 0.0]])
    x[:, 1] = 0
    one = torch.zeros(16, 2).bfloat16()
    one[3, 0] = 1
    found = gemm_avx2.products(x, gemm_avx2.pack(one))[:, 3]
    expected = x[:, 0].bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
