"""Next-token log-probabilities from `transformers`, the reference every engine is held against."""

from functools import cache
from pathlib import Path

import torch
from transformers import Qwen3NextForCausalLM


class Reference:
    """Teacher-forced forward of one checkpoint in ``dtype``; call it with ids to get ``[len(ids), vocab_size]``."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        model, info = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"], info["missing_keys"]
        self.model = model.eval()
        self._logprobs = cache(self._compute)

    def __call__(self, ids: tuple[int, ...]) -> torch.Tensor:
        return self._logprobs(ids)

    @torch.inference_mode()
    def _compute(self, ids: tuple[int, ...]) -> torch.Tensor:
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


@cache
def reference(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Reference:
    return Reference(checkpoint, dtype)
