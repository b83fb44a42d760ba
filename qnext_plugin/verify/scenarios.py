"""What an engine is asked to do; knows no engine. ``comparison`` says how its answers are judged.

An ``EngineConfig`` is one engine start, a ``Scenario`` is a sequence of batches sent to it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

VOCAB_SIZE = 256  # every test vocabulary holds at least these ids
MAX_MODEL_LEN = 1024
ENGINES = ("vllm", "sglang")
SAMPLING = {"temperature": 0.8, "top_k": 20}

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class EngineConfig:
    """One start of each of ``engines``. ``token_budget`` is the most tokens one step computes.

    The whole cache is ``num_blocks`` on vLLM and ``num_tokens`` on SGLang, where ``snapshots`` is how recurrent states
    are kept for prefix caching. ``draft_tokens`` is how many the model's own draft proposes each step, one after
    another; 0 is no speculation. On SGLang ``tree`` makes a tree of them, of that many tokens, two after each, and
    ``overlap`` lets it schedule ahead of the drafts, as it does on GPU. A ``warm`` start runs its scenarios twice, the
    second time on the cache that the first left. ``stages`` are the layers of each pipeline stage, where they are not
    shared out evenly. ``flags`` are the engine's own, and win.
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
    max_model_len: int = MAX_MODEL_LEN
    warm: bool = False
    stages: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """Batches sent one after the other, each as concurrent requests.

    Request i is greedy, unless ``sampled`` with a seed of its prompt's, and says ``max_tokens[i % len(max_tokens)]``.
    ``drafts`` says which of a step's drafts are right, where the engine speculates: ``own`` (the model's, almost none),
    ``right`` (all) or ``cycle`` (none, the first, ... all, in turn). ``aborted`` are prompts whose requests are dropped
    after a few steps, before the first batch, so that the shorter ones are dropped while they decode and the longer
    ones amid their prefill.
    ``turns`` continue the first request: each is another batch, of all that was said before and these tokens.
    ``hits`` lists requests (batch, index) that must be served from the prefix cache, over several blocks;
    ``preempts`` says that the cache must run out on the way. Without them such a scenario would prove nothing.
    """

    batches: tuple[tuple[Prompt, ...], ...]
    configs: tuple[str, ...]
    max_tokens: tuple[int, ...] = (24,)
    prompt_logprobs: bool = False
    drafts: str = "own"
    draft_logits: bool = False
    sampled: bool = False
    aborted: tuple[Prompt, ...] = ()
    turns: tuple[Prompt, ...] = ()
    hits: tuple[tuple[int, int], ...] = ()
    preempts: bool = False

    @property
    def top_k(self) -> int:
        """Of how many most likely tokens the next one is."""
        return int(SAMPLING["top_k"]) if self.sampled else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its output included."""
        single = max(len(prompt) for batch in (*self.batches, self.aborted) for prompt in batch)
        turns = sum(len(turn) + self.max_tokens[0] for turn in self.turns)
        return max(self.max_tokens) + max(single, len(self.batches[0][0]) + turns)


def tokens(length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Prompt:
    """A prompt of ``length`` random ids, the same for the same ``seed``."""
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab_size) for _ in range(length))


CONFIGS = {
    "eager": EngineConfig("tiny", num_blocks=48, engines=ENGINES),
    "compiled": EngineConfig("tiny", compiled=True, num_blocks=48),
    "chunked": EngineConfig("tiny", token_budget=61, num_blocks=48, engines=ENGINES),
    "prefix": EngineConfig("tiny", prefix_caching=True, num_blocks=640, engines=ENGINES, warm=True),
    "prefix-no-buffer": EngineConfig("tiny", prefix_caching=True, snapshots="no_buffer", engines=("sglang",)),
    "starved": EngineConfig(
        "tiny", prefix_caching=True, token_budget=64, num_blocks=44, num_tokens=1300, engines=ENGINES
    ),
    "tp2": EngineConfig("tiny", prefix_caching=True, tensor_parallel=2, num_blocks=160, engines=ENGINES),
    "mtp1": EngineConfig("tiny", draft_tokens=1, num_blocks=48),
    "mtp1-no-buffer": EngineConfig(
        "odd-b", draft_tokens=1, prefix_caching=True, snapshots="no_buffer", engines=("sglang",)
    ),
    "mtp2": EngineConfig("tiny", draft_tokens=2, num_blocks=640, prefix_caching=True),
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
    "pp2-mtp2": EngineConfig(
        "tiny", draft_tokens=2, pipeline_parallel=2, stages=(5, 3), num_blocks=64, engines=ENGINES
    ),
    "ep2-mtp2": EngineConfig("tiny", draft_tokens=2, tensor_parallel=2, expert_parallel=True, num_blocks=64),
    "odd-a": EngineConfig("odd-a", engines=ENGINES),
    "odd-b": EngineConfig("odd-b", engines=ENGINES),
    "odd-c": EngineConfig("odd-c", engines=ENGINES),
    "odd-d": EngineConfig("odd-d", engines=ENGINES),
    "bfloat16": EngineConfig("bfloat16", dtype="bfloat16", engines=ENGINES),
    "bfloat16-mtp2": EngineConfig("bfloat16", dtype="bfloat16", draft_tokens=2),
    "bfloat16-ep2-mtp2": EngineConfig(
        "bfloat16", dtype="bfloat16", draft_tokens=2, tensor_parallel=2, expert_parallel=True
    ),
    "bfloat16-compiled": EngineConfig("bfloat16", dtype="bfloat16", compiled=True, prefix_caching=True),
}

_STARVED = ("starved", "mtp2-starved")
_PLAIN = tuple(name for name, config in CONFIGS.items() if name not in _STARVED and not config.draft_tokens)
_MTP = tuple(name for name, config in CONFIGS.items() if name not in _STARVED and config.draft_tokens)


def scenarios(vocab_size: int = VOCAB_SIZE, scale: float = 1, texts: Sequence[Prompt] = ()) -> dict[str, Scenario]:
    """All of them, by name.

    Lengths are for caches that find prefixes in blocks of up to 64 tokens; ``scale`` multiplies those that matter.
    ``texts`` are further prompts.
    """

    def length(base: int) -> int:
        return round(base * scale)

    def some(base: int, seed: int) -> Prompt:
        return tokens(length(base), seed, vocab_size)

    a, b = some(500, seed=1), some(410, seed=2)
    lengths = tuple(tokens(n, n, vocab_size) for n in (1, 7, 40)) + tuple(some(n, seed=n) for n in (130, 300, 700))
    found = {
        "mixed_lengths": Scenario((lengths,), configs=_PLAIN),
        "arrivals": Scenario(
            # More requests than run at once, and each leaves at another time.
            (tuple(tokens(1 + 37 * i % 101, seed=400 + i, vocab_size=vocab_size) for i in range(20)),),
            configs=("prefix", "mtp2"),
            max_tokens=(2, 24, 7, 40, 13),
            drafts="cycle",
        ),
        "text": Scenario((tuple(texts),), configs=("prefix", "mtp2")),
        "sampled": Scenario(
            (lengths[1:5], lengths[4:0:-1], lengths[2:4]), configs=("prefix",), max_tokens=(16,), sampled=True
        ),
        "drafts_in_every_pattern": Scenario((lengths,), configs=_MTP, drafts="cycle"),
        "drafts_all_right": Scenario((lengths[:5],), configs=_MTP, drafts="right", max_tokens=(38,)),
        "drafts_of_the_model": Scenario((lengths[:5],), configs=("mtp3", "mtp3-tree")),
        "drafts_to_the_last_position": Scenario(
            # On these prompts no two experts tie for the last place, where rounding decides in any implementation.
            (tuple(tokens(MAX_MODEL_LEN - 24 - i, seed=70 + i) for i in range(3)),),
            configs=("mtp3",),
            drafts="cycle",
        ),
        "draft_logits": Scenario(
            ((some(61, seed=7),),), configs=("mtp3", "mtp1-no-buffer"), drafts="cycle", draft_logits=True
        ),
        "aborts": Scenario(
            (lengths[1:4],),
            configs=("mtp1", "mtp1-no-buffer", "mtp2-starved", "starved"),
            drafts="cycle",
            max_tokens=(12,),
            aborted=tuple(some(n, seed=200 + n) for n in (5, 33, 300)),
        ),
        "short": Scenario(
            (lengths[1:4], lengths[:1]), configs=("prefix", "bfloat16", "bfloat16-mtp2"), max_tokens=(8,)
        ),
        "slot_reuse": Scenario(
            # Long sequences leave their state behind; the next ones start in the same slots.
            tuple(tuple(tokens(n, seed=10 * i + n, vocab_size=vocab_size) for n in (90, 65, 3)) for i in range(6)),
            configs=("eager", "compiled", "chunked", "prefix", "prefix-no-buffer", "mtp2", "mtp1-no-buffer"),
            max_tokens=(4,),
            drafts="cycle",
        ),
        "prompt_logprobs": Scenario(
            (lengths[2:5],), ("eager", "chunked", "compiled"), max_tokens=(2,), prompt_logprobs=True
        ),
        "prefix_aba": Scenario(
            ((a,), (b,), (a,), (a[: length(300)] + b[: length(77)], b), (a + b[: length(100)], a[:-1])),
            configs=("prefix", "bfloat16-compiled", "mtp2", "mtp3-tree"),
            drafts="cycle",
            hits=((2, 0), (3, 1), (4, 0), (4, 1)),
        ),
        "multi_turn": Scenario(
            ((a[: length(200)],),),
            configs=("prefix", "prefix-no-buffer", "tp2", "mtp2", "mtp1-no-buffer", "mtp3-tree"),
            max_tokens=(60,),
            drafts="cycle",
            turns=(b[: length(40)], b[length(40) : length(80)], b[length(80) : length(90)]),
            hits=((1, 0), (2, 0), (3, 0)),
        ),
        "preemption": Scenario(
            (tuple(some(260 + 17 * i, seed=100 + i) for i in range(4)),),
            configs=_STARVED,
            max_tokens=(60,),
            drafts="cycle",
            preempts=True,
        ),
        "prefix_chunked": Scenario(
            ((a,), (a[: length(490)] + b[: length(40)],)), configs=_STARVED, drafts="cycle", hits=((1, 0),)
        ),
    }
    return {name: scenario for name, scenario in found.items() if all(scenario.batches)}


SCENARIOS = scenarios()


def configs(engine: str) -> list[str]:
    return [name for name, config in CONFIGS.items() if engine in config.engines]


def pairs(engine: str) -> list[tuple[str, str]]:
    """Every (config name, scenario name) to run on an engine, grouped by config."""
    return [(c, s) for c in configs(engine) for s, scenario in SCENARIOS.items() if c in scenario.configs]
