"""MTP on CPU: replaces Triton kernels for which vLLM has no CPU implementation, or a wrong one.

``register`` gives them to vLLM. The two state copies can go when vLLM has its own, and ``expand`` can go when vLLM's
version writes to outputs of types other than int64 (0.32 and 0.33 do neither).
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def register() -> None:
    """Register our kernels; idempotent. No CPU can run vLLM's first two, so no other model depends on them."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(
        {
            "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": precopy_mamba_align,
            "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": postprocess_mamba,
            "vllm.v1.sample.rejection_sampler.expand_kernel": expand,
        }
    )


def expand(
    output: Tensor, values: Tensor, cu_num_tokens: Tensor, replace_from: float, replace_to: float, *_: Any
) -> None:
    """Repeat each request's value (temperature, top-k or top-p) for each of its tokens, to sample with drafts."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(torch.where(values == replace_from, replace_to, values).repeat_interleave(counts))


@dataclass(frozen=True)
class States:
    """The location of all layers' states as vLLM describes it: addresses and sizes, one entry per state tensor."""

    block_tables: Tensor
    block_table_stride: int
    base_addresses: Tensor
    block_strides: Tensor
    elem_sizes: Tensor
    inner_sizes: Tensor
    conv_widths: Tensor
    groups: Tensor
    row_counts: Tensor
    row_strides: Tensor

    def copy(self, request: int, src_col: int, dst_col: int, bias: int, conv_dim_first: bool) -> None:
        """Copy one request's states to another block-table column, as they are after ``bias`` accepted drafts.

        A convolution window moves left by ``bias`` columns; a recurrent state is read from column ``src_col + bias``.
        """
        tables = self.block_tables.tolist()
        for base, stride, elem, inner, width, group, rows, row_stride in zip(
            *(
                x.tolist()
                for x in (
                    self.base_addresses,
                    self.block_strides,
                    self.elem_sizes,
                    self.inner_sizes,
                    self.conv_widths,
                    self.groups,
                    self.row_counts,
                    self.row_strides,
                )
            ),
            strict=True,
        ):
            row = tables[group] + request * self.block_table_stride * 4

            def address(col: int, row: int = row, base: int = base, stride: int = stride) -> int:
                return base + ctypes.c_int32.from_address(row + 4 * col).value * stride

            if width == 0:
                ctypes.memmove(address(dst_col), address(src_col + bias), inner * elem)
                continue
            count, step, column = (rows, row_stride, elem) if conv_dim_first else (1, 0, inner * elem)
            for i in range(count):
                ctypes.memmove(
                    address(dst_col) + i * step, address(src_col) + i * step + bias * column, (width - bias) * column
                )


def precopy_mamba_align(
    state_idx: Tensor, src_col: Tensor, token_bias: Tensor, *args: Any, CONV_STATE_DIM_FIRST: bool, **_: Any
) -> None:
    """Copy each request's state along before a step in which the request enters another block."""
    *states, idx_mapping, num_reqs = args
    where = States(*states)
    for i in range(num_reqs):
        request = i if idx_mapping is None else int(idx_mapping[i])
        if request < 0:
            continue
        src, dst = int(src_col[request]), int(state_idx[request])
        if src >= 0 and src != dst:
            where.copy(request, src, dst, int(token_bias[request]), CONV_STATE_DIM_FIRST)


def postprocess_mamba(
    num_accepted: Tensor,
    state_idx: Tensor,
    num_scheduled: Tensor | None,
    num_computed: Tensor,
    num_draft: Tensor | None,
    *args: Any,
    block_size: int,
    CONV_STATE_DIM_FIRST: bool,
    PRECOMPUTED_NEW_COMPUTED: bool = False,
    **_: Any,
) -> None:
    """Keep the state at a block's end after a step whose accepted drafts went past it."""
    *states, num_accepted_out, idx_mapping, num_reqs = args
    where = States(*states)
    for i in range(num_reqs):
        request = i if idx_mapping is None else int(idx_mapping[i])
        if request < 0:
            continue
        accepted, src = int(num_accepted[request]), int(state_idx[request])
        if PRECOMPUTED_NEW_COMPUTED:
            computed = int(num_computed[request])
            running = computed - accepted + 1
        else:
            running = int(num_computed[request]) + int(num_scheduled[request]) - int(num_draft[request])
            computed = running + accepted - 1
        aligned = computed // block_size * block_size
        if aligned < running:
            continue
        bias, dst = aligned - running, aligned // block_size - 1
        if src == dst:
            num_accepted_out[request] = 1
        if src != dst or bias:
            where.copy(request, src, dst, bias, CONV_STATE_DIM_FIRST)
