"""Products with what oneDNN packs are those with the plain weights, whichever rows go to whichever matrices."""

import pytest
import torch

from qnext_plugin.ops.cpu import gemm_avx512bf16
from sglang_ext.cpu.gemm import Packed
from tests.support.tolerances import OPS, assert_close

pytestmark = [
    pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        reason="oneDNN multiplies on this CPU",
    ),
]


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("counts", [[1], [6], [7], [0, 3], [1, 0, 13, 2, 50]])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 96), (160, 128)])
def test_products(n, k, counts, num_threads):
    torch.manual_seed(n)
    weights, x = torch.randn(5, n, k).bfloat16(), torch.randn(sum(counts), k + 6).bfloat16()[:, :k]
    used = [4, 2, 0, 1, 3][: len(counts)]
    packed = Packed(weights)
    assert packed.addresses is not None
    parts = zip(x.double().split(counts), used, strict=True)
    expected = torch.cat([part @ weights[i].double().T for part, i in parts])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = packed.products(x, used, counts)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, OPS[torch.bfloat16])


def test_what_is_laid_out_otherwise_or_proves_nothing_is_left_to_onednn(monkeypatch):
    weights = torch.randn(1, 128, 64).bfloat16()
    assert Packed(weights).addresses is not None
    assert Packed(torch.zeros_like(weights)).addresses is None
    assert Packed(torch.randn(1, 33, 70).bfloat16()).addresses is None  # in smaller blocks
    products = gemm_avx512bf16.products
    monkeypatch.setattr(gemm_avx512bf16, "products", lambda *args: products(*args).roll(1, dims=1))
    assert Packed(weights).addresses is None
