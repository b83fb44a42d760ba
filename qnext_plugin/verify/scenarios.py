"""What an engine is asked to do, in sequences of batches. ``comparison`` says how its answers are judged."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

VOCAB_SIZE = 256  # every test vocabulary holds at least these ids
SAMPLING = {"temperature": 0.8, "top_k": 20}

Prompt = tuple[int, ...]


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
        "mixed_lengths": Scenario((lengths,)),
        "arrivals": Scenario(
            # More requests than run at once, and each leaves at another time.
            (tuple(tokens(1 + 37 * i % 101, seed=400 + i, vocab_size=vocab_size) for i in range(20)),),
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
            # Long sequences leave their state behind; the next ones start in the same slots.
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
            (tuple(some(260 + 17 * i, seed=100 + i) for i in range(4)),),
            max_tokens=(60,),
            drafts="cycle",
            preempts=True,
        ),
        "prefix_chunked": Scenario(((a,), (a[: length(490)] + b[: length(40)],)), drafts="cycle", hits=((1, 0),)),
    }
    return {name: scenario for name, scenario in found.items() if all(scenario.batches)}
