"""The engine starts that tests share, and the scenarios that each answers: those of ``qnext verify`` and more."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnext_plugin.engines.config import ENGINES, MAX_MODEL_LEN, EngineConfig
from qnext_plugin.verify.scenarios import Scenario, scenarios, tokens
from qnext_plugin.verify.starts import CASES

_A, _B = tokens(300, seed=81), tokens(280, seed=82)
SCENARIOS = scenarios() | {
    "drafts_to_the_last_position": Scenario(
        # On these prompts no two experts tie for the last place, where rounding decides in any implementation.
        (tuple(tokens(MAX_MODEL_LEN - 24 - i, seed=70 + i) for i in range(3)),),
        drafts="cycle",
    ),
    # A prefix of a part of a block: the same again, a longer one, another, the first, then many at once.
    "partial_hits": Scenario(
        (
            (_A,),
            (_A,),
            (_A + _B[:20],),
            (_B,),
            (_A,),
            tuple(_A[: 300 - 5 * i] + tokens(9 + i, seed=i) for i in range(48)),
        ),
        max_tokens=(12,),
        drafts="cycle",
        hits=((1, 0), (2, 0), (4, 0), (5, 0)),
    ),
    "draft_logits": Scenario(((tokens(61, seed=7),),), drafts="cycle", draft_logits=True),
    # The last prompt waits until the first request ends, then joins the others.
    "one_token_joins": Scenario(
        ((*(tokens(3 + i, seed=i) for i in range(8)), tokens(1, seed=50)),), max_tokens=(2, 4, 4, 4, 4, 4, 4, 4, 4)
    ),
}


@dataclass(frozen=True)
class Case:
    """One start of each of ``engines``; ``drafts`` is vLLM's name of who drafts.

    ``interpreted`` is a mode of ``tests.gpu.vllm_interpreted``, in which it then runs.
    """

    config: EngineConfig
    scenarios: tuple[str, ...]
    checkpoint: str = "tiny"
    engines: tuple[str, ...] = ("vllm",)
    drafts: str = "mtp"
    interpreted: str = ""


def _shared(name: str, engines: tuple[str, ...] = ENGINES, checkpoint: str = "tiny", **sizes: Any) -> Case:
    """As ``qnext verify`` starts it, with the sizes of a small checkpoint."""
    return Case(replace(CASES[name].config, **sizes), CASES[name].scenarios, checkpoint, engines)


_DRAFTS = CASES["mtp3-compiled"].scenarios
_PLAIN = ("mixed_lengths",)
_OTHER_DRAFTS = (*_DRAFTS, "drafts_of_the_model", "arrivals", "sampled", "slot_reuse")
_PREFIXES = ("prefix_aba", "multi_turn")
_BFLOAT16 = EngineConfig(dtype="bfloat16")
_UNIT = ("--block-size", "128", "--prefix-match-unit", "32")
_PARTIAL = EngineConfig(prefix_caching=True, num_blocks=120)
_WHOLE_CONTEXT = ("--context-length", str(MAX_MODEL_LEN))  # without the positions that NEXTN reserves
_PAGES = ("--page-size", "16", "--mamba-track-interval", "128")
_BY_BATCH = (
    "--speculative-config",
    json.dumps(
        {
            "method": "qwen3_next_mtp",
            "num_speculative_tokens": 3,
            "num_speculative_tokens_per_batch_size": [[1, 2, 3], [3, 3, 0], [4, 8, 2]],
        }
    ),
)
_STEPS = Path(__file__).with_name("adaptive.json")  # three for one request, one or two for two, then none, then three
_ADAPTIVE = ("--speculative-adaptive", "--speculative-adaptive-config", str(_STEPS))
# vLLM's defaults on a GPU, but for graphs; prompts come in pieces, beside requests that decode.
_SECOND = EngineConfig(prefix_caching=True, token_budget=128, num_blocks=160, flags=("--async-scheduling",))
_DRAFTING = EngineConfig(draft_tokens=3, prefix_caching=True, token_budget=128)  # prompts come in pieces
MATRIX = {
    "eager": _shared("eager", num_blocks=48),
    "compiled": _shared("compiled", ("vllm",), num_blocks=48),
    "chunked": _shared("chunked", num_blocks=48),
    "prefix": _shared("prefix", num_blocks=640),
    "prefix-no-buffer": _shared("prefix-no-buffer", ("sglang",)),
    "starved": _shared("starved", num_blocks=44),
    "prefix-unit": Case(
        replace(_PARTIAL, flags=(*_UNIT, "--prefix-cache-retention-interval", "128")), ("partial_hits",)
    ),
    "mtp2-prefix-unit": Case(
        replace(_PARTIAL, draft_tokens=2, flags=(*_UNIT, "--enable-mamba-shared-prefix-checkpoint")), ("partial_hits",)
    ),
    "tp2": Case(
        EngineConfig(prefix_caching=True, tensor_parallel=2, num_blocks=160), (*_PLAIN, "multi_turn"), engines=ENGINES
    ),
    "mtp1": Case(EngineConfig(draft_tokens=1, num_blocks=48), (*_DRAFTS, "aborts")),
    "mtp1-no-buffer": Case(
        EngineConfig(draft_tokens=1, prefix_caching=True, snapshots="no_buffer"),
        (*_DRAFTS, "draft_logits", "aborts", "slot_reuse", "multi_turn"),
        "odd-b",
        ("sglang",),
    ),
    "mtp2": _shared("mtp2", ("vllm",), num_blocks=640),
    "mtp2-starved": _shared("mtp2-starved", num_blocks=52),
    "mtp3": Case(
        EngineConfig(draft_tokens=3, num_blocks=64),
        (*_DRAFTS, "drafts_of_the_model", "drafts_to_the_last_position", "prompt_logprobs", "draft_logits"),
        "wide-draft",
        ENGINES,
    ),
    # Of one or two requests, of three, and of more. Not `sampled`: with other numbers a seed gives another answer.
    "mtp3-by-batch": Case(
        replace(_DRAFTING, num_blocks=640, flags=_BY_BATCH),
        ("drafts_in_every_pattern", "drafts_of_the_model", "prefix_aba", "multi_turn"),
    ),
    "mtp3-adaptive": Case(
        replace(_DRAFTING, flags=_ADAPTIVE),
        ("drafts_in_every_pattern", "drafts_of_the_model", "arrivals", "sampled", "multi_turn"),
        engines=("sglang",),
    ),
    "mtp3-tree": _shared("mtp3-tree", ("sglang",), "odd-a"),
    "ngram": Case(
        replace(_DRAFTING, overlap=True, flags=_WHOLE_CONTEXT),
        (*_OTHER_DRAFTS, *_PREFIXES, "drafts_to_the_last_position"),
        "without-draft",
        ("sglang",),
        "ngram",
    ),
    "standalone": Case(
        replace(_DRAFTING, flags=_PAGES), (*_OTHER_DRAFTS, *_PREFIXES), "without-draft", ("sglang",), "draft_model"
    ),
    "eagle3": Case(replace(_DRAFTING, overlap=True), _OTHER_DRAFTS, "without-draft", ("sglang",), "eagle3"),
    "eagle3-prefix": Case(replace(_DRAFTING, overlap=True), _PREFIXES, "without-draft", ("sglang",), "eagle3"),
    "mtp3-compiled": _shared("mtp3-compiled", ("vllm",), num_blocks=64),
    "ngram3": Case(
        EngineConfig(draft_tokens=3, prefix_caching=True, num_blocks=640),
        ("arrivals", *_DRAFTS, "drafts_of_the_model", "prefix_aba", "multi_turn"),
        drafts="ngram",
    ),
    **{
        f"{method}-head": Case(
            EngineConfig(draft_tokens=2, prefix_caching=True, num_blocks=640, token_budget=128),  # prompts in pieces
            ("drafts_in_every_pattern", "prefix_aba", "arrivals", "sampled"),
            drafts=method,
        )
        for method in ("eagle3", "dflash")
    },
    "ngram3-starved": replace(
        _shared("mtp2-starved", ("vllm",), draft_tokens=3, num_blocks=52),
        scenarios=("aborts", "prefix_chunked"),
        drafts="ngram",
    ),
    "second-runner": Case(_SECOND, ("mixed_lengths", "prefix_aba"), interpreted="runner"),
    "second-runner-mtp2": Case(
        replace(_SECOND, draft_tokens=2),
        ("one_token_joins", "drafts_in_every_pattern", "prefix_chunked"),
        "xs",
        interpreted="runner",
    ),
    "second-runner-cpu": Case(replace(_SECOND, draft_tokens=2), ("drafts_in_every_pattern",), interpreted="cpu"),
    "second-runner-gpu": Case(
        replace(_SECOND, draft_tokens=2), ("one_token_joins", "prefix_chunked"), "xs", interpreted="kernels"
    ),
    "tp2-mtp2": Case(EngineConfig(draft_tokens=2, tensor_parallel=2, num_blocks=64), _DRAFTS, "wide-draft", ENGINES),
    "pp2": Case(EngineConfig(pipeline_parallel=2, num_blocks=48), _PLAIN, engines=ENGINES),
    "pp2-mtp2": Case(
        EngineConfig(draft_tokens=2, pipeline_parallel=2, stages=(5, 3), num_blocks=64), _DRAFTS, engines=ENGINES
    ),
    "ep2-mtp2": Case(EngineConfig(draft_tokens=2, tensor_parallel=2, expert_parallel=True, num_blocks=64), _DRAFTS),
    **{name: Case(EngineConfig(), _PLAIN, name, ENGINES) for name in ("odd-a", "odd-b", "odd-c")},
    "odd-d": Case(EngineConfig(dtype="float16"), _PLAIN, "odd-d", ENGINES),
    "bfloat16": Case(_BFLOAT16, (*_PLAIN, "short"), "bfloat16", ENGINES),
    "bfloat16-mtp2": Case(replace(_BFLOAT16, draft_tokens=2), (*_DRAFTS, "short"), "bfloat16"),
    "bfloat16-ep2-mtp2": Case(
        replace(_BFLOAT16, draft_tokens=2, tensor_parallel=2, expert_parallel=True), _DRAFTS, "bfloat16"
    ),
    "bfloat16-compiled": Case(
        replace(_BFLOAT16, compiled=True, prefix_caching=True), (*_PLAIN, "prefix_aba"), "bfloat16"
    ),
}
CONFIGS = {name: case.config for name, case in MATRIX.items()}


def configs(engine: str) -> list[str]:
    return [name for name, case in MATRIX.items() if engine in case.engines]


def scenarios_of(config: str) -> dict[str, Scenario]:
    """What a start answers, by name; not ``text``, for which ``SCENARIOS`` has no prompts."""
    return {name: scenario for name, scenario in SCENARIOS.items() if name in MATRIX[config].scenarios}
