"""Which engine starts and scenarios prove a user's checkpoint; sizes follow its dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.config import FULL, QNextConfig
from qnext_plugin.plan.state import StateSpec
from qnext_plugin.verify.runner import Run, passes
from qnext_plugin.verify.scenarios import CONFIGS, EngineConfig, Prompt, scenarios

QUICK = ("prefix", "mtp2")
FULL_SET = {
    "vllm": ("eager", "compiled", "chunked", "prefix", "starved", "mtp2", "mtp2-starved", "mtp3-compiled"),
    "sglang": (
        *("eager", "compiled", "chunked", "prefix", "prefix-no-buffer", "starved"),
        *("mtp2", "mtp2-starved", "mtp3-tree"),
    ),
}

# Lengths in `scenarios` are for blocks of at most this many tokens.
_BLOCK = 64

TEXTS = (
    "The recurrence keeps one matrix per head. Each token first decays it, then writes the part of its value that the "
    "matrix did not already predict from its key, and reads with its query. ",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n\n\nassert gcd(84, 36) == ",
    '{"name": "Zürich", "coordinates": [47.3769, 8.5417], "tags": ["lake", "rail", "🏔"], "population": ',
    "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张 寒来暑往 秋收冬藏",
)


@dataclass(frozen=True)
class Plan:
    """The starts by name, each with its runs, and (start, scenario) of what is longer than the model takes."""

    starts: dict[str, tuple[EngineConfig, list[Run]]]
    too_long: list[tuple[str, str]]


def plan(
    checkpoint: Path, engine: str, *, dtype: str, draft_tokens: int, full: bool, graphs: bool, flags: Sequence[str]
) -> Plan:
    """``graphs``: whether compiled starts differ from eager ones here."""
    config = QNextConfig.from_pretrained(checkpoint)
    block = block_tokens(config, dtype, draft_tokens) if engine == "vllm" else _BLOCK
    scale = max(1.0, block / _BLOCK)
    found = scenarios(config.vocab_size, scale, texts(checkpoint))
    max_model_len = min(config.max_position_embeddings, max(1024, max(s.longest for s in found.values())))
    starts: dict[str, tuple[EngineConfig, list[Run]]] = {}
    too_long: list[tuple[str, str]] = []
    for name in FULL_SET[engine] if full else QUICK:
        base = CONFIGS[name]
        if (base.draft_tokens and not draft_tokens) or (base.compiled and not graphs):
            continue
        label = name.replace(f"mtp{base.draft_tokens}", f"mtp{draft_tokens}")
        wanted = {key: s for key, s in found.items() if name in s.configs and not s.draft_logits}
        too_long += [(label, key) for key, s in wanted.items() if s.longest > max_model_len]
        wanted = {key: s for key, s in wanted.items() if s.longest <= max_model_len}
        sizes: dict[str, Any] = {"num_blocks": None, "max_model_len": max_model_len}
        if base.token_budget and base.prefix_caching:
            sizes["token_budget"] = max(base.token_budget, 2 * block)
        if "starved" in name:
            sizes["num_blocks"] = _starving_blocks(config, block, round(370 * scale), max_model_len, draft_tokens)
        if base.tree:
            sizes["tree"] = 4 * draft_tokens - 2  # all that a depth of so many has: two drafts, then four each
        drafts = draft_tokens if base.draft_tokens else 0
        chosen = replace(base, checkpoint="", dtype=dtype, draft_tokens=drafts, flags=tuple(flags), **sizes)
        starts[label] = chosen, passes(chosen, wanted)
    return Plan(starts, too_long)


def texts(checkpoint: Path) -> list[Prompt]:
    """Prompts through the checkpoint's tokenizer and chat template; none without."""
    if not (checkpoint / "tokenizer_config.json").exists():
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": TEXTS[0]}]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        found.append(tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    return found


def block_tokens(config: QNextConfig, dtype: str, draft_tokens: int) -> int:
    """About how many tokens vLLM's cache blocks hold: as many as take the memory of a recurrent state."""
    itemsize = getattr(torch, dtype).itemsize
    state = StateSpec(config.gdn, getattr(torch, dtype), num_draft_tokens=draft_tokens).page_bytes
    per_token = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return max(32, 16 * math.ceil(state / per_token / 16))


def _starving_blocks(config: QNextConfig, block: int, length: int, max_model_len: int, draft_tokens: int) -> int:
    """Blocks for two or three of four requests of ``length``, but for a whole one of ``max_model_len``.

    vLLM groups layers of a kind as many as there are of the rarer kind; each group has a block table of its own.
    """
    full = config.layer_types.count(FULL) + (1 if draft_tokens else 0)
    linear = len(config.layer_types) - config.layer_types.count(FULL)
    size = max(full, linear) if max(full, linear) < 1.5 * min(full, linear) else min(full, linear)
    states = math.ceil(linear / size) * (2 + draft_tokens)
    attention = math.ceil(full / size)
    fewest = attention * math.ceil(max_model_len / block) + states + 2
    return max(fewest, round(2.4 * (attention * math.ceil(length / block) + states)))
