"""What FlashInfer's prefill computes, in torch, with the checks that its kernels make; for machines without a GPU."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext_plugin import ops


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    output: Tensor,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    use_cp: str | bool = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute on the pool's ``state_indices`` in place, as FlashInfer 0.7 does; ``g`` is the decay itself."""
    assert output_state is initial_state and output_final_state
    assert all(x.is_contiguous() for x in (q, k, v, g, beta, output, cu_seqlens, state_indices))
    assert q.dtype == k.dtype == v.dtype == output.dtype == torch.bfloat16 and g.dtype == beta.dtype == torch.float32
    assert initial_state.shape[1:] == (v.shape[1], v.shape[2], q.shape[2]) and initial_state.stride()[2:] == (
        q.shape[2],
        1,
    )
    assert state_indices.shape == (len(cu_seqlens) - 1,) and len(q) == len(output) >= cu_seqlens[-1]
    used = state_indices[state_indices > 0].tolist()
    assert len(used) == len(set(used)), "two sequences share a slot"
    assert not initial_state[state_indices.long()].isnan().any(), "the state of a new sequence is not zero"
    every, kept = checkpoint_every_n_tokens, 0
    for i, slot in enumerate(state_indices.tolist()):
        begin, end = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        state = initial_state[slot].float().mT
        for start in range(begin, end, every or max(1, end - begin)):
            stop = min(end, start + (every or end - begin))
            rows = slice(start, stop)
            out, state = ops.chunk_gated_delta_rule(
                *(x[rows].float() for x in (q, k, v)),
                g=g[rows].log(),
                beta=beta[rows],
                initial_state=state[None],
                cu_seqlens=torch.tensor([0, stop - start]),
            )
            state = state[0]
            output[rows] = out.to(output.dtype)
            if every and stop - start == every:
                assert state_checkpoints is not None and checkpoint_cu_starts is not None
                assert kept < checkpoint_cu_starts[i + 1]
                state_checkpoints[kept] = state.mT
                kept += 1
        if every:
            assert checkpoint_cu_starts is not None and kept == checkpoint_cu_starts[i + 1]
        initial_state[slot] = state.mT.to(initial_state.dtype)
    return output, output_state


def install(patch: pytest.MonkeyPatch) -> None:
    """Make vLLM choose FlashInfer, and find this module as FlashInfer."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn

    stub: Any = ModuleType("flashinfer.gdn_prefill")
    stub.chunk_gated_delta_rule = chunk_gated_delta_rule
    patch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    patch.setitem(sys.modules, "flashinfer.gdn_prefill", stub)
    patch.setattr(qwen_gdn_linear_attn, "_resolve_gdn_prefill_backend", lambda config: ("auto", "flashinfer"))
