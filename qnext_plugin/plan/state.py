"""The shapes, dtypes and bytes of one sequence's state in one Gated DeltaNet layer."""

import math
from dataclasses import dataclass

import torch

from qnext_plugin.config import GatedDeltaNetDims


@dataclass(frozen=True)
class StateSpec:
    """The canonical state of one sequence in one layer.

    ``conv_state`` is ``[conv_dim, conv_kernel_size - 1 + num_draft_tokens]``, oldest column first.
    ``recurrent_state`` is ``[num_v_heads, head_k_dim, head_v_dim]``. While speculating, an engine keeps
    ``num_draft_tokens + 1`` recurrent states: one for each draft position and the accepted one.
    """

    dims: GatedDeltaNetDims
    conv_dtype: torch.dtype
    recurrent_dtype: torch.dtype = torch.float32
    num_draft_tokens: int = 0

    @property
    def conv_shape(self) -> tuple[int, int]:
        return self.dims.conv_dim, self.dims.conv_kernel_size - 1 + self.num_draft_tokens

    @property
    def recurrent_shape(self) -> tuple[int, int, int]:
        return self.dims.num_v_heads, self.dims.head_k_dim, self.dims.head_v_dim

    @property
    def page_bytes(self) -> int:
        """The bytes of one cache slot: one ``conv_state`` and one ``recurrent_state``."""
        conv = math.prod(self.conv_shape) * self.conv_dtype.itemsize
        return conv + math.prod(self.recurrent_shape) * self.recurrent_dtype.itemsize
