"""Scenarios that an engine is asked to answer, as sequences of batches; ``comparison`` judges the answers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

VOCAB_SIZE = 256  # every test vocabulary holds at least these ids
SAMPLING = {"temperature": 0.8, "top_k": 20}

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Scenario:
    """A sequence of batches; the requests of a batch are concurrent.

    Request i produces ``max_tokens[i % len(max_tokens)]`` tokens. It is greedy, or, if ``sampled``, it has a seed that
    depends on its prompt. ``drafts`` tells which drafts of a step are right if the engine speculates: ``own`` (the
    model's drafts, almost none is right), ``right`` (all) or ``cycle`` (none, the first, ... all, in turn). ``aborted``
    are prompts whose requests are dropped after a few steps, before the first batch. Short ones are dropped while
    they decode, long ones during their prefill.
    ``turns`` continue the first request: each is another batch, of all tokens so far and these.
    ``hits`` lists requests (batch, index) that must be served from the prefix cache, over several blocks. If
    ``preempts``, the cache must run out meanwhile; if ``drafted``, there must be drafts. Without these conditions such
    a scenario would prove nothing.
    """

    batches: tuple[tuple[Prompt, ...], ...]
    max_tokens: tuple[int, ...] = (24,)
    prompt_logprobs: bool = False
    drafts: str = "own"
    draft_logits: bool = False
    sampled: bool = False
    aborted: tuple[Prompt, ...] = ()
    turns: tuple[Prompt, ...] = ()
    hits: tuple[tuple[int, int], ...] = ()
    preempts: bool = False
    drafted: bool = False

    @property
    def top_k(self) -> int:
        """The number of most likely tokens from which the next one is chosen."""
        return int(SAMPLING["top_k"]) if self.sampled else 1

    @property
    def longest(self) -> int:
        """The number of tokens of the longest request, its output included."""
        single = max(len(prompt) for batch in (*self.batches, self.aborted) for prompt in batch)
        turns = sum(len(turn) + self.max_tokens[0] for turn in self.turns)
        return max(self.max_tokens) + max(single, len(self.batches[0][0]) + turns)


def tokens(length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Prompt:
    """Return a prompt of ``length`` random ids; the same ``seed`` gives the same ids."""
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab_size) for _ in range(length))


def scenarios(vocab_size: int = VOCAB_SIZE, scale: float = 1, texts: Sequence[Prompt] = ()) -> dict[str, Scenario]:
    """Return all scenarios by name.

    The lengths suit caches that find prefixes in blocks of up to 64 tokens; ``scale`` multiplies the lengths that
    depend on blocks. ``texts`` are further prompts.
    """

    def length(base: int) -> int:
        return round(base * scale)

    def some(base: int, seed: int) -> Prompt:
        return tokens(length(base), seed, vocab_size)

    a, b = some(500, seed=1), some(410, seed=2)
    lengths = tuple(tokens(n, n, vocab_size) for n in (1, 7, 40)) + tuple(some(n, seed=n) for n in (130, 300, 700))
    found = {
        "mixed_lengths": Scenario((lengths,)),
        "arrivals": Scenario(
            # There are more requests than can run at once, and they end at different times. Every sixth has one token.
            (tuple(tokens(1 + i % 6 * 37 % 101, seed=400 + i, vocab_size=vocab_size) for i in range(20)),),
            max_tokens=(2, 24, 7, 40, 13),
            drafts="cycle",
        ),
        "text": Scenario((tuple(texts),)),
        "sampled": Scenario((lengths[1:5], lengths[4:0:-1], lengths[2:4]), max_tokens=(16,), sampled=True),
        "drafts_in_every_pattern": Scenario((lengths,), drafts="cycle"),
        "drafts_all_right": Scenario((lengths[:5],), drafts="right", max_tokens=(38,)),
        "drafts_of_the_model": Scenario((lengths[:5],)),
        "aborts": Scenario(
            (lengths[1:4],),
            drafts="cycle",
            max_tokens=(12,),
            aborted=tuple(some(n, seed=200 + n) for n in (5, 33, 300)),
        ),
        "short": Scenario((lengths[1:4], lengths[:1]), max_tokens=(8,)),
        "slot_reuse": Scenario(
            # Sequences leave their state behind, and the next ones start in the same slots.
            tuple(tuple(tokens(n, seed=10 * i + n, vocab_size=vocab_size) for n in (90, 65, 3)) for i in range(6)),
            max_tokens=(4,),
            drafts="cycle",
        ),
        "prompt_logprobs": Scenario((lengths[2:5],), max_tokens=(2,), prompt_logprobs=True),
        "prefix_aba": Scenario(
            ((a,), (b,), (a,), (a[: length(300)] + b[: length(77)], b), (a + b[: length(100)], a[:-1])),
            drafts="cycle",
            hits=((2, 0), (3, 1), (4, 0), (4, 1)),
        ),
        "multi_turn": Scenario(
            ((a[: length(200)],),),
            max_tokens=(60,),
            drafts="cycle",
            turns=(b[: length(40)], b[length(40) : length(80)], b[length(80) : length(90)]),
            hits=((1, 0), (2, 0), (3, 0)),
        ),
        "preemption": Scenario(
            # Each grows by more than it starts with, so more requests are taken in than have room at their end.
            (tuple(some(60 + 5 * i, seed=100 + i) for i in range(8)),),
            max_tokens=(length(128),),
            drafts="cycle",
            preempts=True,
        ),
        "prefix_chunked": Scenario(((a,), (a[: length(490)] + b[: length(40)],)), drafts="cycle", hits=((1, 0),)),
    }
    return {name: scenario for name, scenario in found.items() if all(scenario.batches)}
