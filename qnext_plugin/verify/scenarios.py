"""What an engine is asked to do; knows no engine. ``comparison`` says how its answers are judged.

An ``EngineConfig`` is one engine start, a ``Scenario`` is a sequence of batches sent to it.
"""

import random
from dataclasses import dataclass

VOCAB_SIZE = 256  # every test vocabulary holds at least these ids
MAX_MODEL_LEN = 1024
ENGINES = ("vllm", "sglang")


@dataclass(frozen=True)
class EngineConfig:
    """One start of each of ``engines``. ``token_budget`` is the most tokens one step computes.

    The whole cache is ``num_blocks`` on vLLM and ``num_tokens`` on SGLang, where ``snapshots`` is how recurrent states
    are kept for prefix caching. ``draft_tokens`` is how many the model's own draft proposes each step, one after
    another; 0 is no speculation. On SGLang ``tree`` makes a tree of them, of that many tokens, two after each, and
    ``overlap`` lets it schedule ahead of the drafts, as it does on GPU.
    """

    checkpoint: str
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
    engines: tuple[str, ...] = ("vllm",)
    num_tokens: int | None = None
    snapshots: str = "extra_buffer"
    tree: int = 0
    overlap: bool = False


@dataclass(frozen=True)
class Scenario:
    """Batches sent one after the other, each as concurrent greedy requests of ``max_tokens``.

    ``drafts`` says which of a step's drafts are right, where the engine speculates: ``own`` (the model's, almost none),
    ``right`` (all) or ``cycle`` (none, the first, ... all, in turn). ``aborted`` are prompts whose requests are dropped
    after three steps, before the first batch.
    ``turns`` continue the first request: each is another batch, of all that was said before and these tokens.
    ``hits`` lists requests (batch, index) that must be served from the prefix cache, over several blocks;
    ``preempts`` says that the cache must run out on the way. Without them such a scenario would prove nothing.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    configs: tuple[str, ...]
    max_tokens: int = 24
    prompt_logprobs: bool = False
    drafts: str = "own"
    draft_logits: bool = False
    aborted: tuple[tuple[int, ...], ...] = ()
    turns: tuple[tuple[int, ...], ...] = ()
    hits: tuple[tuple[int, int], ...] = ()
    preempts: bool = False


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """A prompt of ``length`` random ids, the same for the same ``seed``."""
    rng = random.Random(seed)
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))


CONFIGS = {
    "eager": EngineConfig("tiny", num_blocks=48, engines=ENGINES),
    "compiled": EngineConfig("tiny", compiled=True, num_blocks=48),
    "chunked": EngineConfig("tiny", token_budget=64, num_blocks=48, engines=ENGINES),
    "prefix": EngineConfig("tiny", prefix_caching=True, num_blocks=160, engines=ENGINES),
    "prefix-no-buffer": EngineConfig("tiny", prefix_caching=True, snapshots="no_buffer", engines=("sglang",)),
    "starved": EngineConfig(
        "tiny", prefix_caching=True, token_budget=64, num_blocks=44, num_tokens=1300, engines=ENGINES
    ),
    "tp2": EngineConfig("tiny", prefix_caching=True, tensor_parallel=2, num_blocks=160, engines=ENGINES),
    "mtp1": EngineConfig("tiny", draft_tokens=1, num_blocks=48),
    "mtp1-no-buffer": EngineConfig(
        "odd-b", draft_tokens=1, prefix_caching=True, snapshots="no_buffer", engines=("sglang",)
    ),
    "mtp2": EngineConfig("tiny", draft_tokens=2, num_blocks=200, prefix_caching=True),
    "mtp2-starved": EngineConfig(
        "tiny",
        draft_tokens=2,
        prefix_caching=True,
        token_budget=64,
        num_blocks=52,
        num_tokens=1300,
        overlap=True,
        engines=ENGINES,
    ),
    "mtp3": EngineConfig("tiny", draft_tokens=3, num_blocks=64, engines=ENGINES),
    "mtp3-tree": EngineConfig("odd-a", draft_tokens=3, tree=10, prefix_caching=True, overlap=True, engines=("sglang",)),
    "mtp3-compiled": EngineConfig("tiny", draft_tokens=3, compiled=True, num_blocks=64),
    "tp2-mtp2": EngineConfig("tiny", draft_tokens=2, tensor_parallel=2, num_blocks=64, engines=ENGINES),
    "pp2": EngineConfig("tiny", pipeline_parallel=2, num_blocks=48, engines=ENGINES),
    "pp2-mtp2": EngineConfig("tiny", draft_tokens=2, pipeline_parallel=2, num_blocks=64, engines=ENGINES),
    "ep2-mtp2": EngineConfig("tiny", draft_tokens=2, tensor_parallel=2, expert_parallel=True, num_blocks=64),
    "odd-a": EngineConfig("odd-a", engines=ENGINES),
    "odd-b": EngineConfig("odd-b", engines=ENGINES),
    "odd-c": EngineConfig("odd-c", engines=ENGINES),
    "odd-d": EngineConfig("odd-d", engines=ENGINES),
    "bfloat16": EngineConfig("bfloat16", dtype="bfloat16", engines=ENGINES),
    "bfloat16-mtp2": EngineConfig("bfloat16", dtype="bfloat16", draft_tokens=2),
    "bfloat16-compiled": EngineConfig("bfloat16", dtype="bfloat16", compiled=True, prefix_caching=True),
}

_A, _B = tokens(500, seed=1), tokens(410, seed=2)
_LENGTHS = tuple(tokens(length, seed=length) for length in (1, 7, 40, 130, 300, 700))

_STARVED = ("starved", "mtp2-starved")
_PLAIN = tuple(name for name, config in CONFIGS.items() if name not in _STARVED and not config.draft_tokens)
_MTP = tuple(name for name, config in CONFIGS.items() if name not in _STARVED and config.draft_tokens)

SCENARIOS = {
    "mixed_lengths": Scenario((_LENGTHS,), configs=_PLAIN),
    "drafts_in_every_pattern": Scenario((_LENGTHS,), configs=_MTP, drafts="cycle"),
    "drafts_all_right": Scenario((_LENGTHS[:5],), configs=_MTP, drafts="right", max_tokens=38),
    "drafts_of_the_model": Scenario((_LENGTHS[:5],), configs=("mtp3", "mtp3-tree")),
    "drafts_to_the_last_position": Scenario(
        # On these prompts no two experts tie for the last place, where rounding decides in any implementation.
        (tuple(tokens(MAX_MODEL_LEN - 24 - i, seed=70 + i) for i in range(3)),),
        configs=("mtp3",),
        drafts="cycle",
    ),
    "draft_logits": Scenario(
        ((tokens(61, seed=7),),), configs=("mtp3", "mtp1-no-buffer"), drafts="cycle", draft_logits=True
    ),
    "aborts": Scenario(
        (_LENGTHS[1:4],),
        configs=("mtp1", "mtp1-no-buffer", "mtp2-starved", "starved"),
        drafts="cycle",
        max_tokens=12,
        aborted=tuple(tokens(length, seed=200 + length) for length in (5, 33, 300)),
    ),
    "short": Scenario((_LENGTHS[1:4],), configs=("prefix",), max_tokens=8),
    "slot_reuse": Scenario(
        # Long sequences leave their state behind; the next ones start in the same slots.
        tuple(tuple(tokens(length, seed=10 * i + length) for length in (90, 65, 3)) for i in range(6)),
        configs=("eager", "compiled", "chunked", "prefix", "prefix-no-buffer", "mtp2", "mtp1-no-buffer"),
        max_tokens=4,
        drafts="cycle",
    ),
    "prompt_logprobs": Scenario((_LENGTHS[2:5],), ("eager", "chunked", "compiled"), max_tokens=2, prompt_logprobs=True),
    "prefix_aba": Scenario(
        ((_A,), (_B,), (_A,), (_A[:300] + _B[:77], _B), (_A + _B[:100], _A[:499])),
        configs=("prefix", "bfloat16-compiled", "mtp2", "mtp3-tree"),
        drafts="cycle",
        hits=((2, 0), (3, 1), (4, 0), (4, 1)),
    ),
    "multi_turn": Scenario(
        ((_A[:200],),),
        configs=("prefix", "prefix-no-buffer", "tp2", "mtp2", "mtp1-no-buffer", "mtp3-tree"),
        max_tokens=60,
        drafts="cycle",
        turns=(_B[:40], _B[40:80], _B[80:90]),
        hits=((1, 0), (2, 0), (3, 0)),
    ),
    "preemption": Scenario(
        (tuple(tokens(260 + 17 * i, seed=100 + i) for i in range(4)),),
        configs=_STARVED,
        max_tokens=60,
        drafts="cycle",
        preempts=True,
    ),
    "prefix_chunked": Scenario(((_A,), (_A[:490] + _B[:40],)), configs=_STARVED, drafts="cycle", hits=((1, 0),)),
}


def configs(engine: str) -> list[str]:
    return [name for name, config in CONFIGS.items() if engine in config.engines]


def pairs(engine: str) -> list[tuple[str, str]]:
    """Every (config name, scenario name) to run on an engine, grouped by config."""
    return [(c, s) for c in configs(engine) for s, scenario in SCENARIOS.items() if c in scenario.configs]
