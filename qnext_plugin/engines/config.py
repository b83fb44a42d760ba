"""The options with which an engine is started, and the MTP flags of each engine."""

import json
import os
from dataclasses import dataclass
from typing import Any

ENGINES = ("vllm", "sglang")
MAX_MODEL_LEN = 1024
VLLM_BLOCK_SIZE = 32  # requested with prefix caching; vLLM rounds it up until a block holds a recurrent state


@dataclass(frozen=True)
class EngineConfig:
    """The options of one start of an engine. ``token_budget`` is the largest number of tokens that a step computes.

    ``num_blocks`` is the size of the cache on vLLM, ``num_tokens`` on SGLang. ``snapshots`` is SGLang's way to keep
    recurrent states for prefix caching. ``draft_tokens`` is how many tokens the model's MTP layer drafts in a step,
    one after another; 0 turns speculation off. On SGLang ``tree`` is the number of tokens in a tree of drafts, in
    which two follow each token, and ``overlap`` lets SGLang schedule ahead of the drafts, as it does on GPU. A
    ``warm`` start runs its scenarios twice; the second time they find the cache as the first time left it. ``stages``
    are the numbers of layers of the pipeline stages, if they are not equal. ``flags`` are the engine's own flags and
    take precedence.
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
    """Return the keyword arguments of ``vllm.LLM`` or ``sglang.Engine`` that turn on the model's own MTP.

    There are none for 0 tokens. ``tree`` is as in ``EngineConfig``.
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
    """Return the flags of the engine's command line that turn on the model's own MTP."""
    flags = []
    for name, value in mtp_arguments(engine, num_draft_tokens).items():
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)
        flags += ["--" + name.replace("_", "-"), text]
    return flags


def all_cores() -> dict[str, str]:
    """Return environment variables that make an engine use all cores of a CPU; vLLM leaves one idle by default.

    Variables that are set already are left out.
    """
    chosen = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: value for name, value in chosen.items() if name not in os.environ}
