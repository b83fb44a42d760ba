"""The convolution of a layer by the compiled kernel of ``ops.cpu``, with the cache's columns as rows in memory."""

from itertools import pairwise

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from qnext_plugin.ops.cpu import causal_conv1d
from qnext_plugin.ops.cpu.causal_conv1d import convolve
from vllm_ext.cpu.phases import Drafts, Prefills, TorchConv
from vllm_ext.state import DeltaNetLayer, conv_view


class CompiledConv(TorchConv):
    """The convolution of ``ops.cpu``, which reads and writes the columns of the cache where they are."""

    name = "compiled"
    available = staticmethod(causal_conv1d.available)

    def decode(self, layer: DeltaNetLayer, x: Tensor, slots: Tensor) -> Tensor:
        return self._update(layer, _rows(x)[:, None], slots, np.zeros(len(slots), np.int64))

    def verify(self, layer: DeltaNetLayer, x: Tensor, drafts: Drafts) -> Tensor:
        rows = _rows(x)[drafts.rows.numpy()]
        out = self._update(layer, rows, drafts.slots[:, 0], drafts.num_accepted.numpy() - 1)
        return out if drafts.full else out[drafts.real.flatten()]

    def prefill(self, layer: DeltaNetLayer, x: Tensor, batch: Prefills) -> Tensor:
        width, rows = layer.conv_kernel_size, _rows(x)
        zeros = torch.zeros(x.shape[1], dtype=x.dtype)
        columns = _columns(layer, batch.slots, np.zeros(len(batch.slots), np.int64), width - 1)
        history = np.where(batch.has_state.numpy()[:, None], columns, zeros.data_ptr())
        bounds = pairwise(batch.cu_seqlens.tolist())
        streams = [np.append(past, rows[begin:end]) for past, (begin, end) in zip(history, bounds, strict=True)]
        windows = np.concatenate([sliding_window_view(stream, width) for stream in streams if len(stream) >= width])
        return convolve(
            windows, layer.packed_conv_weight, columns, np.stack([s[len(s) - width + 1 :] for s in streams])
        )

    def _update(self, layer: DeltaNetLayer, rows: np.ndarray, slots: Tensor, first: np.ndarray) -> Tensor:
        """Convolve ``rows`` [N, D] after the columns from ``first`` [N] on, and store all but the oldest of them."""
        width = layer.conv_kernel_size
        stream = np.concatenate([_columns(layer, slots, first, width - 1), rows], axis=1)
        stored = _columns(layer, slots, np.zeros_like(first), stream.shape[1] - 1)
        windows = sliding_window_view(stream, width, axis=1).reshape(-1, width)
        return convolve(windows, layer.packed_conv_weight, stored, stream[:, 1:])


def _rows(x: Tensor) -> np.ndarray:
    """Return the addresses of the rows of ``x`` [T, C]."""
    assert x.stride(1) == 1
    return x.data_ptr() + x.stride(0) * x.itemsize * np.arange(len(x))


def _columns(layer: DeltaNetLayer, slots: Tensor, first: np.ndarray, count: int) -> np.ndarray:
    """Return the addresses [N, count] of the cache's columns of ``slots`` [N] from ``first`` [N] on."""
    cache = conv_view(layer.kv_cache[0])
    assert cache.stride(1) == 1 and cache.dtype == torch.bfloat16
    by_slot, by_column = (cache.itemsize * cache.stride(i) for i in (0, 2))
    start = cache.data_ptr() + by_slot * slots.numpy().astype(np.int64) + by_column * first
    return start[:, None] + by_column * np.arange(count)
