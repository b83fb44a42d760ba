"""How an engine is started: the options that both engines have, and MTP as each of them spells it."""

import json
import os
from dataclasses import dataclass
from typing import Any

ENGINES = ("vllm", "sglang")
MAX_MODEL_LEN = 1024
VLLM_BLOCK_SIZE = 32  # asked for with prefix caching; vLLM rounds it up until a block holds a recurrent state


@dataclass(frozen=True)
class EngineConfig:
    """One start of an engine. ``token_budget`` is the most tokens one step computes.

    The whole cache is ``num_blocks`` on vLLM and ``num_tokens`` on SGLang, where ``snapshots`` is how recurrent states
    are kept for prefix caching. ``draft_tokens`` is how many the model's own draft proposes each step, one after
    another; 0 is no speculation. On SGLang ``tree`` makes a tree of them, of that many tokens, two after each, and
    ``overlap`` lets it schedule ahead of the drafts, as it does on GPU. A ``warm`` start runs its scenarios twice, the
    second time on the cache that the first left. ``stages`` are the layers of each pipeline stage, where they are not
    shared out evenly. ``flags`` are the engine's own, and win.
    """

    dtype: str = "float32"
    compiled: bool = False
    prefix_caching: bool = False
    token_budget: int | None = None
    num_blocks: int | None = None
    draft_tokens: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    executor: str | None = None
    num_tokens: int | None = None
    snapshots: str = "extra_buffer"
    tree: int = 0
    overlap: bool = False
    max_model_len: int = MAX_MODEL_LEN
    warm: bool = False
    stages: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


def mtp_arguments(engine: str, num_draft_tokens: int, tree: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM`` or ``sglang.Engine`` that turn on the model's own MTP; none for 0 tokens.

    ``tree`` is as in ``EngineConfig``.
    """
    if not num_draft_tokens:
        return {}
    if engine == "vllm":
        return {"speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": num_draft_tokens}}
    return {
        "speculative_algorithm": "NEXTN",
        "speculative_num_steps": num_draft_tokens,
        "speculative_eagle_topk": 2 if tree else 1,
        "speculative_num_draft_tokens": tree or num_draft_tokens + 1,
    }


def mtp_flags(engine: str, num_draft_tokens: int) -> list[str]:
    """The same on the engine's command line."""
    flags = []
    for name, value in mtp_arguments(engine, num_draft_tokens).items():
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)
        flags += ["--" + name.replace("_", "-"), text]
    return flags


def all_cores() -> dict[str, str]:
    """Environment variables for all cores on a CPU, without those that are set: vLLM leaves one idle by default."""
    chosen = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: value for name, value in chosen.items() if name not in os.environ}
