"""The compiled convolution against float64, and the rows that it copies."""

import numpy as np
import pytest
import torch

from qnext_plugin.ops.cpu.causal_conv1d import convolve


def addresses(x):
    return x.data_ptr() + x.stride(0) * x.itemsize * np.arange(len(x))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("num_channels", "width"), [(1, 4), (70, 2), (1000, 4)])
def test_rows_are_convolved_and_then_copied_in_order(monkeypatch, num_channels, width, num_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    rows, weight = torch.randn(9, 2 * num_channels).bfloat16()[:, :num_channels], torch.randn(num_channels, width)
    before, at = rows.clone(), addresses(rows)
    windows = torch.randint(9, (13, width))
    out = convolve(at[windows.numpy()], weight, at[:8], at[1:])
    expected = torch.nn.functional.silu((before[windows].double() * weight.mT.double()).sum(1))
    assert bool(((out - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all())
    assert torch.equal(rows, before[[*range(1, 9), 8]])


def test_a_row_has_the_same_bits_in_any_batch():
    rows, weight = torch.randn(35, 1000).bfloat16(), torch.randn(1000, 4)
    windows, none = np.lib.stride_tricks.sliding_window_view(addresses(rows), 4), np.zeros(0, np.int64)
    together = convolve(windows, weight, none, none)
    for t in range(len(windows)):
        assert torch.equal(convolve(windows[t : t + 1], weight, none, none)[0], together[t])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    rows, none = torch.ones(4, 70).bfloat16(), np.zeros(0, np.int64)
    rows[2, 33] = value
    out = convolve(addresses(rows)[None], torch.ones(70, 4), none, none)[0]
    assert out[33] == value if value > 0 else out[33].isnan() or out[33] == 0
    assert bool(out[torch.arange(70) != 33].isfinite().all())
