"""Contracts of DeepGEMM's operators for weights in FP8 blocks, which both engines call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"contract: DeepGEMM wants {message}")


def aligned(rows: int, bytes_of_one: int) -> int:
    """Return rows such that columns begin at multiples of 16 bytes."""
    return -(-rows * bytes_of_one // 16) * 16 // bytes_of_one


def by_columns(scales: Tensor) -> Tensor:
    """Scales of inputs, laid out by columns for the tensor memory accelerator."""
    require(scales.dtype == torch.float32, f"scales in float32, not {scales.dtype}")
    *groups, rows, columns = scales.shape
    high = aligned(rows, 4)
    strides = [columns * high] * len(groups) + [1, high]
    return scales.new_empty(0).new_empty_strided(scales.shape, strides)


def as_required(scales: Tensor, rows: int, inputs: int, *recipe: Any) -> Tensor:
    """Scales of a weight's blocks are taken as they are; those of single rows by columns."""
    of_weight = scales.shape[-2] == -(-rows // BLOCK)
    return scales if of_weight else by_columns(scales)


def check(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor) -> None:
    rows, inputs = b.shape[-2:]
    for name, x in (("a", a), ("b", b)):
        require(x.dtype == torch.float8_e4m3fn, f"{name} in FP8, not {x.dtype}")
        require(x.stride(-1) == 1, f"{name} contiguous in its last dimension, strides {x.stride()}")
        require(x.data_ptr() % 16 == 0, f"{name} aligned to 16 bytes")
    blocks = -(-inputs // BLOCK)
    require(a.shape[-1] == inputs, f"{inputs} inputs, not {tuple(a.shape)}")
    require(out.shape == (*a.shape[:-1], rows), f"{rows} results for each row, not {tuple(out.shape)}")
    require(
        out.dtype in (torch.bfloat16, torch.float32) and out.stride(-1) == 1, f"bfloat16 or float32, not {out.dtype}"
    )
    require(a_scales.shape == (*a.shape[:-1], blocks), f"a scale for each row and block, not {tuple(a_scales.shape)}")
    wanted = (*b.shape[:-2], -(-rows // BLOCK), blocks)
    require(b_scales.shape == wanted, f"scales {wanted} of b, not {tuple(b_scales.shape)}")
    for name, x in (("a", a_scales), ("b", b_scales)):
        require(x.dtype == torch.float32, f"float32 scales of {name}, not {x.dtype}")


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, *_: Any) -> None:
    check(a, a_scales, b, b_scales, out)


def product_of_groups(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, group: Tensor, *_: Any
) -> None:
    """Each row of ``a`` has the number of its group, or each group the number of its rows."""
    require(group.dtype == torch.int32 and group.is_contiguous(), f"groups in int32, not {group.dtype}")
    check(a, a_scales, b, b_scales, out)


FAKES: dict[str, Callable[..., Any]] = {
    f"deep_gemm::{name}": function
    for name, function in {
        "get_num_sms": lambda: 132,
        "get_pdl": lambda: False,
        "get_tma_aligned_size": aligned,
        "get_mk_alignment_for_contiguous_layout": lambda: BLOCK,
        "get_theoretical_mk_alignment_for_contiguous_layout": lambda *_: BLOCK,
        "get_mn_major_tma_aligned_tensor": by_columns,
        "transform_sf_into_required_layout": as_required,
        "fp8_fp4_gemm_nt": product,
        "m_grouped_fp8_fp4_gemm_nt_contiguous": product_of_groups,
        "m_grouped_fp8_fp4_gemm_nt_masked": product_of_groups,
    }.items()
}
