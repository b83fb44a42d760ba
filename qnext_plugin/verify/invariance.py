"""Whether a request gets the same answer in every bit alone and among others: ``qnext verify --batch-invariant``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import MAX_MODEL_LEN, EngineConfig
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.runner import Run, Start
from qnext_plugin.verify.scenarios import Prompt, Scenario, tokens
from qnext_plugin.verify.starts import Plan

LARGEST = 32  # requests at once
SOME_SIZES = (2, 3, 4, 5, 6, 7, 8, 13, 21, 32)
LENGTHS = (2, 7, 33, 64, 130, 400)  # of prompts; one step computes all of them
PIECE = 64  # tokens of a prompt that a step of the start "pieces" computes
AT_ONCE = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests"}
ENVIRONMENT = {"VLLM_CPU_ATTN_SPLIT_KV": "0"}
"""What an engine needs for it: otherwise vLLM's attention splits a request's keys by how many others there are."""

DECODE, PROMPTS, AFTER, PIECES = "decode", "prompts together", "decode after them", "prompts in pieces"
COLUMNS = ("start", "what", "positions", "differ", "max", "first", "verdict")
BITWISE = "bitwise"


@dataclass
class Row:
    """How many ``positions`` of ``what`` were compared, how many ``differ``, the largest difference and the first."""

    start: str
    what: str
    positions: int = 0
    differ: int = 0
    max: float = 0.0
    first: str = ""
    failure: str = ""

    def add(self, differences: Iterable[float], where: str) -> None:
        for difference in differences:
            self.positions += 1
            if difference:
                self.differ, self.max, self.first = self.differ + 1, max(self.max, difference), self.first or where

    @property
    def verdict(self) -> str:
        if not self.positions:
            return self.failure or "not run"
        return BITWISE if not self.differ else "not bitwise"

    def cells(self) -> list[str]:
        numbers = [f"{self.positions}", f"{self.differ}", f"{self.max:.1e}"] if self.positions else [""] * 3
        return [self.start, self.what, *numbers, self.first, self.verdict]

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"verdict": self.verdict}


def plan(
    checkpoint: Path, engine: str, *, dtype: str, draft_tokens: int, full: bool, graphs: bool, flags: Sequence[str]
) -> Plan:
    """Plan the starts, as ``starts.plan`` does. In a ``full`` one batches have every size up to ``LARGEST``."""
    config = QNextConfig.from_pretrained(checkpoint)
    max_model_len = min(config.max_position_embeddings, MAX_MODEL_LEN)
    vocab_size = config.vocab_size
    single = [(1 + 97 * i % (vocab_size - 1),) for i in range(LARGEST)]
    prompts = [tokens(n, n, vocab_size) for n in LENGTHS if n + 8 <= max_model_len]
    sizes = range(2, LARGEST + 1) if full else SOME_SIZES
    decode = Scenario((*alone(single), *(tuple(single[-n:]) for n in sizes)), max_tokens=(16,))
    together = Scenario(
        (*alone(prompts), tuple(prompts), tuple(prompts[::-2]), (prompts[-1], *single[:3])),
        max_tokens=(8,),
        prompt_logprobs=True,
    )
    apart = replace(together, batches=alone(prompts))
    base = EngineConfig(
        dtype=dtype,
        draft_tokens=draft_tokens,
        max_model_len=max_model_len,
        flags=(AT_ONCE[engine], str(LARGEST), *flags),
    )
    starts = {
        "whole": (base, [Run(DECODE, decode), Run(PROMPTS, together)]),
        "pieces": (replace(base, token_budget=PIECE), [Run(PIECES, apart)]),
    }
    if full and graphs:
        starts["compiled"] = (replace(base, compiled=True), [Run(DECODE, decode), Run(PROMPTS, together)])
    return Plan(starts, [])


def alone(prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], ...]:
    return tuple((prompt,) for prompt in prompts)


def judge(starts: Sequence[Start], failures: dict[str, str]) -> list[Row]:
    """Return the rows of all starts; in those that failed the first has the reason."""
    rows = []
    by_name = {start.name: start for start in starts}
    for start in starts:
        found = {what: Row(start.name, what) for run in start.runs for what in KINDS[run.key]}
        next(iter(found.values())).failure = failures.get(start.name, "")
        for run in start.runs:
            if run.key not in start:
                continue
            result = start[run.key]
            if run.key != PIECES:
                compare(result, result, found, run.key)
            elif PROMPTS in by_name["whole"]:
                compare(by_name["whole"][PROMPTS], result, found, run.key)
        rows += found.values()
    return rows


KINDS = {DECODE: (DECODE,), PROMPTS: (PROMPTS, AFTER), PIECES: (PIECES,)}
"""The rows of each run: the prompt's positions and those after it, or only one of the two."""


def compare(expected: Result, result: Result, rows: dict[str, Row], key: str) -> None:
    """Add to ``rows`` how the requests of ``result`` differ from those that were alone in ``expected``."""
    known = {batch[0].prompt: batch[0] for batch in reversed(expected.batches) if len(batch) == 1}
    for batch in result.batches:
        for place, completion in enumerate(batch):
            if (own := known.get(completion.prompt)) is None or own is completion:
                continue
            where = f"{len(completion.prompt)} tokens, place {place + 1} of {len(batch)}"
            computed = len(completion.ids) - len(completion.token_ids) + 1  # with the prompt
            differences = list(apart(own, completion))
            parts = {DECODE: differences, PIECES: differences[:computed]}
            parts |= {PROMPTS: differences[:computed], AFTER: differences[computed:]}
            for kind in KINDS[key]:
                rows[kind].add(parts[kind], where)


def apart(a: Completion, b: Completion) -> Iterator[float]:
    """Yield for each position how far two answers to one prompt are apart, until they choose another token."""
    before = len(a.ids) - len(a.token_ids)
    for i in range(len(a.ids)):
        one, other = (dict(zip(c.ids[i].tolist(), c.logprobs[i].tolist(), strict=True)) for c in (a, b))
        least = min(one.values()), min(other.values())  # an upper bound for ids that only one of them reports
        yield max(abs(one.get(t, least[0]) - other.get(t, least[1])) for t in one | other)
        if i >= before and a.token_ids[i - before] != b.token_ids[i - before]:
            return
