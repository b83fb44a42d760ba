"""Plan the engine starts and scenarios that verify a user's checkpoint, with sizes that fit its dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import VLLM_BLOCK_SIZE, EngineConfig
from qnext_plugin.plan.caches import DEVICES, VllmCache, default_state_dtype
from qnext_plugin.plan.sizes import Serving
from qnext_plugin.verify.runner import Run, passes
from qnext_plugin.verify.scenarios import Prompt, scenarios


@dataclass(frozen=True)
class Case:
    """A way to start an engine, without the sizes that depend on a checkpoint, and the scenarios that test it."""

    config: EngineConfig
    scenarios: tuple[str, ...]


_WHOLE = ("mixed_lengths", "slot_reuse", "prompt_logprobs")
_DRAFTS = ("drafts_in_every_pattern", "drafts_all_right")
_STARVED = EngineConfig(prefix_caching=True, token_budget=64, num_tokens=1300)
_PRESSED = ("aborts", "preemption", "prefix_chunked")
CASES = {
    "eager": Case(EngineConfig(), _WHOLE),
    "compiled": Case(EngineConfig(compiled=True), _WHOLE),
    "chunked": Case(EngineConfig(token_budget=61), _WHOLE),
    "prefix": Case(
        EngineConfig(prefix_caching=True, warm=True),
        ("mixed_lengths", "arrivals", "text", "sampled", "short", "slot_reuse", "prefix_aba", "multi_turn"),
    ),
    "prefix-no-buffer": Case(
        EngineConfig(prefix_caching=True, snapshots="no_buffer"), ("mixed_lengths", "slot_reuse", "multi_turn")
    ),
    "starved": Case(_STARVED, _PRESSED),
    "mtp2": Case(
        EngineConfig(draft_tokens=2, prefix_caching=True),
        ("arrivals", "text", *_DRAFTS, "slot_reuse", "prefix_aba", "multi_turn"),
    ),
    "mtp2-starved": Case(replace(_STARVED, draft_tokens=2, overlap=True), _PRESSED),
    "mtp3-compiled": Case(EngineConfig(draft_tokens=3, compiled=True), _DRAFTS),
    "mtp3-tree": Case(
        EngineConfig(draft_tokens=3, tree=10, prefix_caching=True, overlap=True),
        (*_DRAFTS, "drafts_of_the_model", "prefix_aba", "multi_turn"),
    ),
}
QUICK = ("prefix", "mtp2")
FULL_SET = {
    "vllm": ("eager", "compiled", "chunked", "prefix", "starved", "mtp2", "mtp2-starved", "mtp3-compiled"),
    "sglang": (
        *("eager", "compiled", "chunked", "prefix", "prefix-no-buffer", "starved"),
        *("mtp2", "mtp2-starved", "mtp3-tree"),
    ),
}

# The lengths in `scenarios` suit blocks of at most this many tokens.
BLOCK = 64

TEXTS = (
    "The recurrence keeps one matrix per head. Each token first decays it, then writes the part of its value that the "
    "matrix did not already predict from its key, and reads with its query. ",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n\n\nassert gcd(84, 36) == ",
    '{"name": "Zürich", "coordinates": [47.3769, 8.5417], "tags": ["lake", "rail", "🏔"], "population": ',
    "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张 寒来暑往 秋收冬藏",
)


@dataclass(frozen=True)
class Plan:
    """The starts by name, each with its runs, and (start, scenario) of those too long for the model."""

    starts: dict[str, tuple[EngineConfig, list[Run]]]
    too_long: list[tuple[str, str]]


def plan(
    checkpoint: Path, engine: str, *, dtype: str, draft_tokens: int, full: bool, graphs: bool, flags: Sequence[str]
) -> Plan:
    """Plan starts and runs for a checkpoint. ``graphs`` tells whether compiled starts differ from eager ones here."""
    config = QNextConfig.from_pretrained(checkpoint)

    def cache(drafts: int) -> VllmCache:
        """Return the cache of a single rank; with more ranks, blocks hold as many tokens or fewer."""
        device, served = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
        state_dtype = default_state_dtype("vllm", device, {}, served)
        return VllmCache(
            Serving(config, 1, drafts, served), state_dtype, DEVICES[device], user_block_size=VLLM_BLOCK_SIZE
        )

    block = cache(draft_tokens).block_size if engine == "vllm" else BLOCK
    scale = max(1.0, block / BLOCK)
    found = scenarios(config.vocab_size, scale, texts(checkpoint))
    max_model_len = min(config.max_position_embeddings, max(1024, max(s.longest for s in found.values())))
    starts: dict[str, tuple[EngineConfig, list[Run]]] = {}
    too_long: list[tuple[str, str]] = []
    for name in FULL_SET[engine] if full else QUICK:
        base = CASES[name].config
        if (base.draft_tokens and not draft_tokens) or (base.compiled and not graphs):
            continue
        label = name.replace(f"mtp{base.draft_tokens}", f"mtp{draft_tokens}")
        drafts = draft_tokens if base.draft_tokens else 0
        wanted = {key: s for key, s in found.items() if key in CASES[name].scenarios}
        too_long += [(label, key) for key, s in wanted.items() if s.longest > max_model_len]
        wanted = {key: s for key, s in wanted.items() if s.longest <= max_model_len}
        sizes: dict[str, Any] = {"max_model_len": max_model_len}
        if base.token_budget and base.prefix_caching:
            sizes["token_budget"] = max(base.token_budget, 2 * block)
        if "starved" in name and engine == "vllm":
            sizes["num_blocks"] = _starving_blocks(cache(drafts), round(200 * scale), max_model_len)
        if base.tree:
            sizes["tree"] = 4 * draft_tokens - 2  # the full tree of this depth: two drafts, then four at each level
        chosen = replace(base, dtype=dtype, draft_tokens=drafts, flags=tuple(flags), **sizes)
        starts[label] = chosen, passes(chosen, wanted)
    return Plan(starts, too_long)


def texts(checkpoint: Path) -> list[Prompt]:
    """Return prompts made with the checkpoint's tokenizer and chat template; none if it has no tokenizer."""
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


def _starving_blocks(cache: VllmCache, length: int, max_model_len: int) -> int:
    """Return a number of blocks for two or three requests of ``length``, and for one of ``max_model_len``."""
    return max(cache.blocks(max_model_len) + 2, round(2.4 * cache.blocks(length)))
