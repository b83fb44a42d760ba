"""What we hand to the operators of other packages, and who is told to install them."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from qnext_plugin import ops
from qnext_plugin.ops import packages
from tests.gpu.dry.packages import check


@pytest.fixture(autouse=True)
def asked_again():
    packages.load.cache_clear()
    yield
    packages.load.cache_clear()


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """What causal-conv1d's operator of this name demands and computes."""
    check(x, weight, seq_idx)
    assert bias is None and initial_states is None and activation == "silu"
    length = x.shape[2]
    out = torch.zeros_like(x)
    for lag, column in enumerate(weight.T.flip(0)):
        same = F.pad(seq_idx, (lag, 0), value=-1)[:, :length] == seq_idx
        out += column[:, None] * (F.pad(x, (lag, 0))[..., :length] * same[:, None])
    return F.silu(out)


def install(monkeypatch, module, **attributes):
    stub = ModuleType(module)
    vars(stub).update(attributes)
    monkeypatch.setitem(sys.modules, module, stub)


@pytest.mark.parametrize("lengths", [(1,), (5,), (2, 0, 1, 70, 3)])
@pytest.mark.parametrize("width", [2, 4])
def test_causal_conv1d_is_ours(monkeypatch, lengths, width):
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    torch.manual_seed(0)
    x, weight = torch.randn(sum(lengths), 16), torch.randn(16, width)
    states, starts = torch.randn(len(lengths), 16, width - 1), F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    out, new = packages.causal_conv1d(x, weight, conv_state=states, cu_seqlens=starts)
    expected, expected_new = ops.causal_conv1d(x, weight, conv_state=states, cu_seqlens=starts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(new, expected_new)


def test_states_are_read_and_written_in_their_slots(monkeypatch):
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    torch.manual_seed(0)
    x, weight, cache = torch.randn(5, 8), torch.randn(8, 4), torch.randn(9, 6, 8).transpose(1, 2)  # room for drafts
    slots, starts, is_old = torch.tensor([7, 2]), torch.tensor([0, 1, 5]), torch.tensor([True, False])
    before = cache.clone()
    states = before[slots, :, :3] * is_old[:, None, None]
    out = packages.causal_conv1d_in_slots(x, weight, cache, slots, is_old, starts)
    expected, new = ops.causal_conv1d(x, weight, conv_state=states, cu_seqlens=starts)
    torch.testing.assert_close(out, expected)
    before[slots, :, :3] = new
    assert torch.equal(cache, before)


def test_only_names_of_packages_ask_for_them():
    assert packages.asked("fla,causal_conv1d") == ("fla", "causal_conv1d")
    assert packages.asked("causal_conv1d") == ("causal_conv1d",)
    assert packages.asked("triton") == packages.asked("auto") == packages.asked(None) == ()


@pytest.mark.parametrize("name", packages.PACKAGES)
def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch, name):
    package = packages.PACKAGES[name]
    monkeypatch.setitem(sys.modules, package.module, None)
    with pytest.raises(ValueError, match=rf"'{name}'.* cannot be imported .*pip install '{package.install}'"):
        packages.load(name)
    install(monkeypatch, package.module.partition(".")[0], __path__=[])
    install(monkeypatch, package.module, **{package.operator: lambda x: x})
    with pytest.raises(ValueError, match=rf"'{name}'.* does not take {package.parameter}; pip install"):
        packages.load(name)
