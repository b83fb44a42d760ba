"""Compiled products with weights of 4 and 8 bits on x86-64 CPUs, which are multiplied as they are packed.

``multiply.py`` has the loops; with AMX, ``decoded.py`` takes many rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from qnext_plugin.ops.cpu import decoded, routed
from qnext_plugin.ops.cpu.decoders import FEATURES
from qnext_plugin.ops.cpu.experts import routed_experts
from qnext_plugin.ops.cpu.jit import barrier, in_parallel
from qnext_plugin.ops.cpu.multiply import multiply, sections
from qnext_plugin.ops.cpu.packing import BLOCK, Form
from qnext_plugin.ops.cpu.panels import FIELDS, HEADER, chunk_of, coding
from qnext_plugin.ops.instructions import has_amx


@cache
def available() -> bool:
    """Return whether these products can run here; the first call compiles them."""
    compiled = {"+avx2", "+fma", "+f16c"} <= FEATURES and in_parallel(_region) is not None
    return compiled and (not has_amx() or decoded.available())


def products(
    form: Form,
    x: Tensor,
    packed: Tensor,
    used: Sequence[int] = (0,),
    counts: Sequence[int] | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply rows of ``x`` by packed matrices: the next ``counts[i]`` of the ``rows`` by matrix ``used[i]``.

    By default all rows are multiplied by the first matrix. ``x`` [T, k] is bfloat16 or float32, ``packed`` uint8
    [matrices, blocks, bytes] or [blocks, bytes], as ``packing.pack`` returns it, ``rows`` [R] int64 indices, by default
    each row once. Returns [R, blocks * BLOCK] in ``dtype``, bfloat16 or float32. Sums are in float32. An input that is
    not finite makes no output of its row a finite number.
    """
    x, rows = x.contiguous(), None if rows is None else rows.contiguous()
    num_rows = (x if rows is None else rows).shape[0]
    counts = (num_rows,) if counts is None else counts
    out = torch.empty(num_rows, packed.shape[-2] * BLOCK, dtype=dtype)
    most = decoded.MANY - 1 if has_amx() else num_rows
    scratch = _scratch(form)
    header = _header(form, packed, x, rows, out, scratch, (len(counts), most))
    _run(np.array([*header, 0, *used, *counts], np.int64))
    if max(counts, default=0) > most:
        decoded.fill(out, form, x, packed, used, counts, rows)
    return out


def linear(form: Form, x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Multiply ``x`` [T, k] by one matrix of ``n`` outputs, add ``bias`` and round once; returns [T, n] bfloat16."""
    if bias is None:
        return products(form, x, packed)[:, :n]
    return (products(form, x, packed, dtype=torch.float32)[:, :n] + bias).to(torch.bfloat16)


def experts(
    forms: tuple[Form, Form], x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """Return ``experts.routed_experts`` for packed weights of two ``forms``, whose own ``k`` are H and I."""
    if has_amx() and len(x) >= decoded.MANY:
        return _experts_by_parts(forms, x, w13, w2, topk_weights, topk_ids)
    # One region: for a few tokens, calls of the parts take longer than what is between the products.
    x, ids, weights = x.contiguous(), topk_ids.long().contiguous(), topk_weights.float().contiguous()
    pairs, num_experts = ids.numel(), len(w13)
    gate_up, hidden = torch.empty(pairs, w13.shape[-2] * BLOCK), torch.empty(pairs, forms[1].k)
    down = torch.empty(pairs, w2.shape[-2] * BLOCK, dtype=torch.bfloat16)
    out, scratch = torch.empty_like(x), _scratch(*forms)
    lists = torch.empty(3 * (num_experts + pairs), dtype=torch.int64)
    tokens = lists[3 * num_experts :]
    sizes = 0, pairs  # how many matrices are used is found inside
    second = torch.tensor([*_header(forms[1], w2, hidden, None, down, scratch, sizes), 0])
    tensors = (ids, weights, gate_up, hidden, down, out, lists, second)
    task = torch.tensor([*ids.shape, num_experts, *(tensor.data_ptr() for tensor in tensors)])
    _run(np.array([*_header(forms[0], w13, x, tokens, gate_up, scratch, sizes), task.data_ptr()], np.int64))
    return out


def _experts_by_parts(
    forms: tuple[Form, Form], x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    first, second = forms

    def gate_up(x: Tensor, rows: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return products(first, x, w13, used, counts, rows, torch.float32)[:, : 2 * second.k]

    def down(x: Tensor, used: Sequence[int], counts: Sequence[int]) -> Tensor:
        return products(second, x, w2, used, counts)[:, : first.k]

    return routed_experts(x, topk_weights, topk_ids, gate_up, down)


def _header(
    form: Form, packed: Tensor, x: Tensor, rows: Tensor | None, out: Tensor, scratch: Tensor, sizes: tuple[int, int]
) -> tuple[int, ...]:
    """Return the fields of ``HEADER`` but for the last; ``sizes`` are the numbers of matrices and ``most``."""
    assert packed.is_contiguous() and packed.shape[-1] == form.offsets[-1] and x.shape[-1] == form.k
    chunk, (matrices, most) = chunk_of(form), sizes
    shape = (matrices, packed.shape[-2], form.k, form.padded_k, form.groups, chunk, len(out), most)
    addresses = (packed.data_ptr(), x.data_ptr(), 0 if rows is None else rows.data_ptr(), out.data_ptr())
    return (
        *shape,
        *coding(form),
        *sections(form, chunk),
        *addresses,
        scratch.data_ptr(),
        x.element_size(),
        out.element_size(),
    )


def _scratch(*forms: Form) -> Tensor:
    size = max(sections(form, chunk_of(form))[-1] for form in forms)
    return torch.empty(torch.get_num_threads(), size, dtype=torch.int32)


def _run(data: np.ndarray) -> None:
    run = in_parallel(_region)
    assert run is not None
    run(data)


def _region(data: Any) -> None:
    """Compute one thread's share of a call: of a product, or of two with what ``routed`` has around them."""
    first = carray(data, 1, HEADER)[0]
    at, lists, apart = data, carray(data, len(FIELDS) + 2 * first.matrices, np.int64)[len(FIELDS) :], first.matrices
    if first.experts:
        lists, apart = routed.sort(first)
    for step in range(2 if first.experts else 1):
        if step:
            at = routed.second(first)
        h = carray(at, 1, HEADER)[0]
        multiply(h, lists, lists[apart:])  # in one place, as each would be compiled
        if first.experts:
            barrier()
            if step:
                routed.combine(first)
            else:
                routed.activate(first)
                barrier()
