import inspect

import pytest
import torch

from qnext_plugin import ops
from qnext_plugin.reference import formulas
from tests.support.tolerances import OPS, assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-3  # large enough for its place in the formula to show


def random(*shape, dtype):
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * 0.1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_centered_rms_norm(dtype):
    x, weight = random(3, 2, 13, dtype=dtype), random(13, dtype=dtype)
    out = ops.zero_centered_rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert_close(out, formulas.zero_centered_rms_norm(x.double(), weight.double(), EPS), OPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gated(dtype):
    x, gate, weight = random(3, 2, 13, dtype=dtype), random(3, 2, 13, dtype=dtype), random(13, dtype=torch.float32)
    out = ops.rms_norm_gated(x, gate, weight, EPS)
    assert out.dtype == dtype
    assert_close(out, formulas.rms_norm_gated(x.double(), gate.double(), weight.double(), EPS), OPS[dtype])


def test_norms_of_large_halves_do_not_overflow():
    x, weight = torch.full((2, 13), 6e4, dtype=torch.float16), torch.zeros(13, dtype=torch.float16)
    assert_close(ops.zero_centered_rms_norm(x, weight, 1e-6), torch.ones(2, 13), OPS[torch.float16])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_route(dtype, renormalize):
    router_logits = torch.stack([torch.randperm(33) for _ in range(7)]).to(dtype) / 8  # no ties
    weights, ids = ops.route(router_logits, top_k=5, renormalize=renormalize)
    want, want_ids = formulas.route(router_logits.double(), 5, renormalize)
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want, OPS[weights.dtype])


def test_every_public_function_is_exported():
    modules = [getattr(ops, name) for name in ("gated_delta_rule", "norms", "routing")]
    modules.append(inspect.getmodule(ops.causal_conv1d))
    public = {
        name
        for module in modules
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and not name.startswith("_")
    }
    assert sorted(public) == ops.__all__
