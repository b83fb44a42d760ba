"""Prompts of one token that vLLM schedules with placeholders for drafts.

With MTP vLLM appends placeholders to a request with one token to compute that joins others, so that all rows of the
batch are equally long. A row that verifies drafts goes on from the state in its slot; a new request has none there.
``compat.REPLACEMENTS`` tells when each of these wrappers can go.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

signature = cache(inspect.signature)


def build_metadata(original: Callable[..., Any], builder: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``GDNAttentionMetadataBuilder.build``: zero the slots of requests whose first step verifies drafts."""
    metadata = original(builder, *args, **kwargs)
    verified = metadata.spec_sequence_masks_cpu
    if verified is not None:
        batch = signature(original).bind(builder, *args, **kwargs).arguments["common_attn_metadata"]
        first = batch.seq_lens_cpu_upper_bound <= batch.query_start_loc_cpu.diff()
        metadata.first_steps = first[verified].nonzero().flatten()
        _zero_states(builder, metadata.spec_state_indices_tensor, metadata.first_steps)
    return metadata


def update_block_table(original: Callable[..., Any], builder: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``GDNAttentionMetadataBuilder.update_block_table``, by which other layers get their metadata: the same."""
    updated = original(builder, metadata, *args, **kwargs)
    if hasattr(metadata, "first_steps"):
        updated.first_steps = metadata.first_steps
        _zero_states(builder, updated.spec_state_indices_tensor, metadata.first_steps)
    return updated


def _zero_states(builder: Any, slots: Tensor, rows: Tensor) -> None:
    if not len(rows):
        return
    new = slots[rows.to(slots.device), 0]
    layers = builder.vllm_config.compilation_config.static_forward_context
    for name in builder.layer_names:
        for state in layers[name].kv_cache:
            state[new] = 0


def prepare_attn(original: Callable[..., Any], state: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap ``MambaHybridModelState.prepare_attn`` of the second model runner: verify placeholders of new requests too.

    As a prompt, their row would leave a state that has seen the placeholders.
    """
    drafts, runs_as_decode = input_batch.num_draft_tokens_per_req, input_batch.prefill_runs_as_decode_np
    if drafts is not None and runs_as_decode is not None:
        input_batch.prefill_runs_as_decode_np = runs_as_decode | (input_batch.is_prefilling_np & (drafts > 0))
    return original(state, input_batch, *args, **kwargs)
