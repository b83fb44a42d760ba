"""Products over packed weights are those over plain ones, and packing can be undone."""

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn

from sglang_ext.cpu.gemm import FOR_AVX2, PACKS, Packed, PackedForAvx2, Plain, plain_weights
from tests.support.tolerances import OPS, assert_close


class Projection(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(33, 70).to(dtype), requires_grad=False)
        self.weight.weight_loader = "kept"
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x, bias):
        return self.quant_method.apply(self, x, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_packed_outside_of_loading_only(dtype):
    torch.manual_seed(0)
    model = Projection(dtype)
    param, plain = model.weight, model.weight.data.clone()
    x, bias = torch.randn(5, 80).to(dtype)[:, :70], torch.randn(33).to(dtype)
    for scale in (1, 2):  # the first load, then a later one
        with plain_weights(model):
            assert torch.equal(param, plain)
            param.data.copy_(plain := scale * plain)
        assert param.numel() == (0 if PACKS and dtype == torch.bfloat16 else plain.numel())
        assert_close(model(x, bias), F.linear(x.double(), plain.double(), bias.double()), OPS[dtype])
        assert model.weight is param and param.weight_loader == "kept"


def test_weights_are_packed_again_after_a_load_that_fails():
    model = Projection(torch.bfloat16)
    with plain_weights(model):
        pass
    with pytest.raises(ValueError, match="misshapen"), plain_weights(model):
        raise ValueError("misshapen")
    assert model(torch.zeros(1, 70, dtype=torch.bfloat16), None).shape == (1, 33)
    assert hasattr(model.weight, "packed") == PACKS


@pytest.mark.parametrize("packed", [Plain, PackedForAvx2 if FOR_AVX2 else Packed] if PACKS else [Plain])
def test_matrices_of_experts(packed):
    """Each multiplies its own rows, which ``gate_up`` picks first."""
    torch.manual_seed(0)
    weights, x = torch.randn(5, 34, 70).bfloat16(), torch.randn(9, 70).bfloat16()
    used, counts, rows = [3, 0, 4], [2, 0, 5], torch.tensor([8, 1, 1, 4, 0, 7, 3])
    matrices = packed(weights.clone())
    parts = zip(x[rows].double().split(counts), used, strict=True)
    expected = torch.cat([part @ weights[i].double().T for part, i in parts])
    assert_close(matrices.gate_up(x, rows, used, counts), expected, OPS[torch.bfloat16])
    assert_close(matrices.down(x[rows].float(), used, counts), expected, OPS[torch.bfloat16])
