"""Breakages of what vLLM does with recurrent states; see ``mutants``."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from tests.engines.mutants import Mutant


def slot_not_zeroed(model: Any) -> AbstractContextManager[Any]:
    """A new sequence reads what its recurrent slot held before."""
    from vllm_ext.kernels import TorchDelta

    prefill = TorchDelta.prefill

    def broken(self: Any, layer: Any, mixed: Any, b: Any, a: Any, batch: Any) -> Any:
        return prefill(self, layer, mixed, b, a, replace(batch, has_state=torch.ones_like(batch.has_state)))

    return patch.object(TorchDelta, "prefill", broken)


def state_dropped_at_prefix_restore(model: Any) -> AbstractContextManager[Any]:
    """A prefix-cache hit finds zeros where the restored recurrent state should be."""
    from vllm.v1.worker import mamba_utils

    preprocess = mamba_utils.preprocess_mamba

    def broken(
        scheduler_output: Any, kv_cache_config: Any, cache_config: Any, state_idx: Any, input_batch: Any,
        requests: Any, forward_context: Any, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        known = set(state_idx)
        preprocess(
            scheduler_output, kv_cache_config, cache_config, state_idx, input_batch, requests, forward_context,
            *args, **kwargs,
        )  # fmt: skip
        restored = [r for r in input_batch.req_ids if r not in known and requests[r].num_computed_tokens > 0]
        for group, spec in enumerate(kv_cache_config.kv_cache_groups):
            for name in spec.layer_names:
                if type(forward_context[name]).__name__ == "GatedDeltaNet":
                    for request in restored:
                        block = requests[request].block_ids[group][state_idx[request]]
                        forward_context[name].kv_cache[1][block] = 0

    return patch.object(mamba_utils, "preprocess_mamba", broken)


MUTANTS = {
    "state_dropped_at_prefix_restore": Mutant(state_dropped_at_prefix_restore, "prefix_aba"),
    "slot_not_zeroed": Mutant(slot_not_zeroed, "slot_reuse"),
}
