"""Count from the configuration what a step must move and compute, and how fast it can therefore be."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.bench.ceilings import Ceilings
from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.config import FULL, LINEAR, QNextConfig
from qnext_plugin.plan.caches import default_state_dtype
from qnext_plugin.plan.sizes import Serving


@dataclass(frozen=True)
class Work:
    """The bytes that are read and written, and the operations (a multiplication and an addition are two)."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the shortest possible time, with moving and computing fully overlapped."""
        return max(self.bytes / ceilings.read, self.flops / ceilings.gemm)


@dataclass(frozen=True)
class Model:
    """A model as one device serves it; ``headers`` are the headers of a quantized checkpoint."""

    serving: Serving
    state_dtype: torch.dtype
    headers: Mapping[str, TensorInfo] | None = None

    def prefill(self, batch: int, length: int) -> Work:
        """Return the work of ``batch`` prompts of ``length`` tokens in one step.

        This includes the first token of each answer and its drafts.
        """
        return self._trunk(batch, length, 0, sampled=1) + self._drafts(batch, length, 0)

    def decode(self, batch: int, context: float) -> Work:
        """Return the work of one step of ``batch`` sequences of ``context`` tokens.

        With drafts, this includes verifying them and drafting the next.
        """
        drafts = self.serving.num_draft_tokens
        return self._trunk(batch, 1 + drafts, context, sampled=1 + drafts) + self._drafts(batch, 1, context)

    def _trunk(self, batch: int, length: int, context: float, sampled: int) -> Work:
        config, drafts = self.serving.config, self.serving.num_draft_tokens
        layers = config.layer_types.count(LINEAR)
        state = self.serving.state(self.serving.dtype, self.state_dtype, drafts)
        recurrent = prod(state.recurrent_shape)
        # A state is read once and written once, and written once more after each draft.
        moved = 2 * state.page_bytes + drafts * recurrent * self.state_dtype.itemsize
        # Each token and element of a state takes two operations for reading with the key, for the write, and for
        # reading with the query.
        delta_rule = Work(batch * layers * moved, 6 * batch * length * layers * recurrent)
        full = config.layer_types.count(FULL)
        return self._weights(False, batch, length, sampled) + self._attention(full, batch, length, context) + delta_rule

    def _drafts(self, batch: int, length: int, context: float) -> Work:
        """Return the work of the passes through the MTP layer, one for each draft.

        Only the first pass can have more than one token.
        """
        work = Work(0, 0)
        for i in range(self.serving.num_draft_tokens):
            new = 1 if i else length
            work += self._weights(True, batch, new, sampled=1) + self._attention(1, batch, new, context)
        return work

    def _weights(self, mtp: bool, batch: int, length: int, sampled: int) -> Work:
        """Return the work of the trunk's weights, or of the MTP layer's; both include the shared head."""
        config, tokens = self.serving.config, batch * length

        def belongs(name: str) -> bool:
            head = "lm_head" in name or (config.tie_word_embeddings and "embed_tokens" in name)
            return head or (name.startswith("mtp.") == mtp and not (mtp and "embed_tokens" in name))

        def rows(name: str) -> tuple[float, float]:
            """Return the share of a weight that is read, and by how many tokens it is multiplied."""
            parts = name.split(".")
            if "lm_head" in parts or (config.tie_word_embeddings and "embed_tokens" in parts):
                return 1.0, batch * sampled
            if "embed_tokens" in parts:
                return min(1.0, tokens / config.vocab_size), 0
            if "experts" in parts:  # the share that at least one token chooses, if all experts are equally likely
                chosen = config.num_experts_per_tok / config.num_experts
                return 1 - (1 - chosen) ** tokens, tokens * chosen
            return 1.0, tokens

        moved = sum(size * rows(name)[0] for name, size in self.serving.tensors(self.headers) if belongs(name))
        shapes = expected_tensors(config, mtp=mtp).items()
        flops = sum(2 * prod(s) * rows(name)[1] for name, s in shapes if len(s) > 1 and belongs(name))
        return Work(moved, flops)

    def _attention(self, layers: int, batch: int, length: int, context: float) -> Work:
        """Return the work of attention: each query meets every key and value up to its position.

        New keys and values are only written.
        """
        config = self.serving.config
        seen = length * context + length * (length + 1) / 2
        heads = config.num_attention_heads * config.head_dim
        moved = layers * batch * (context + length) * self.serving.kv_bytes_per_layer
        return Work(moved, 4 * layers * batch * heads * seen)


def limit(
    model: Model, ceilings: Ceilings, *, batch: int, length: int, output: int = 0, tokens_per_step: float = 1.0
) -> float:
    """Return the highest tokens per second of a prefill, or of a decode of ``output`` tokens after ``length``."""
    if not output:
        return batch * length / model.prefill(batch, length).seconds(ceilings)
    return batch * tokens_per_step / model.decode(batch, length + output / 2).seconds(ceilings)


def add_limits(
    workloads: Mapping[str, dict[str, Any]],
    engines: Mapping[str, str],
    ceilings: Mapping[str, float],
    directory: Path,
    task: Any,
) -> None:
    """Add by side the tokens per second that the machine's rates allow, if one device does all the work.

    ``engines`` maps sides to engines; ``task`` is the work of each side.
    """
    metadata = read_checkpoint(str(directory))
    dtype = getattr(torch, task.dtype)
    serving = Serving(QNextConfig.from_dict(metadata.config), 1, task.draft_tokens, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, row in workloads.items():
        row["limit"] = {}
        for side, engine in engines.items():
            model = Model(serving, default_state_dtype(engine, device, metadata.config, dtype), metadata.headers)
            steps = statistics.median(row.get("tokens per step", {}).get(side, [1.0]))
            row["limit"][side] = limit(model, Ceilings(**ceilings), tokens_per_step=steps, **task.workloads[name])
