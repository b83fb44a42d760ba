"""The kernels of other packages for prompts on GPUs, which ``--linear-attn-prefill-backend`` may name."""

from typing import Any

from sglang.kernels.ops.attention.fla.chunk import CHUNK_SIZE
from sglang.kernels.ops.attention.fla.index import prepare_chunk_indices
from torch import Tensor

from qnext_plugin.ops import packages


def extend(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    inplace_update: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor, None]:
    """Return what SGLang's Triton kernel does, except states in the middle of a prompt (``config.check_packages``)."""
    slots = cache_indices.long()
    out, state = packages.chunk_gated_delta_rule(
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=ssm_states[slots],
        cu_seqlens=query_start_loc,
        chunk_indices=prepare_chunk_indices(query_start_loc, CHUNK_SIZE),  # once for all layers
        use_qk_l2norm_in_kernel=True,
    )
    if inplace_update:
        ssm_states[slots] = state.to(ssm_states.dtype)
    return out, state, None


def convolve_prefill(
    backend: Any, layer: Any, forward_batch: Any, mixed_qkv: Tensor, conv_states: Tensor, cache_indices: Tensor
) -> Tensor:
    """Convolve ``mixed_qkv`` [T, C] with causal-conv1d; new states go to their slots of ``conv_states``."""
    is_old, starts = forward_batch.extend_prefix_lens > 0, backend.forward_metadata.query_start_loc
    return packages.causal_conv1d_in_slots(mixed_qkv, layer.conv_weights, conv_states, cache_indices, is_old, starts)
