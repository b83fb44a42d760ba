"""What `qnext verify --batch-invariant` makes of answers that differ in a bit."""

import math
from dataclasses import replace

import pytest
import torch

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.invariance import AFTER, COLUMNS, DECODE, LARGEST, PIECES, PROMPTS, judge, plan
from qnext_plugin.verify.report import table
from qnext_plugin.verify.runner import Start

VOCAB = 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(directory, dtype="float32")
    return directory


def answer(prompt, num_tokens, with_prompt):
    """Something that depends on the prompt only, in the order of likelihood."""
    rows = num_tokens + (len(prompt) - 1 if with_prompt else 0)
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(sum(prompt) + len(prompt)))
    logprobs, ids = logits.log_softmax(-1).sort(-1, descending=True)
    return Completion(prompt, tuple(ids[-num_tokens:, 0].tolist()), ids, logprobs)


def judged(checkpoint, directory, change=lambda start, key, place, completion: completion, full=False):
    """Judge these answers after ``change``; the place is (batch, request)."""
    planned = plan(checkpoint, "vllm", dtype="float32", draft_tokens=0, full=full, graphs=False, flags=())
    starts = []
    for name, (config, runs) in planned.starts.items():
        start = Start("vllm", checkpoint, config, runs, directory / name)
        start.directory.mkdir()
        for i, run in enumerate(runs):
            batches = [
                [
                    change(name, run.key, (b, r), answer(p, run.scenario.max_tokens[0], run.scenario.prompt_logprobs))
                    for r, p in enumerate(batch)
                ]
                for b, batch in enumerate(run.scenario.batches)
            ]
            Result(batches, num_preemptions=0, block_size=32).save(start.directory / f"{i}.safetensors")
        starts.append(start)
    return {(row.start, row.what): row for row in judge(starts, {})}


def test_the_same_bits_are_bitwise(checkpoint, tmp_path):
    rows = judged(checkpoint, tmp_path, full=True)
    assert list(rows) == [("whole", DECODE), ("whole", PROMPTS), ("whole", AFTER), ("pieces", PIECES)]
    assert all((row.verdict == "bitwise" and row.positions > 100) or row.what == AFTER for row in rows.values())
    assert rows["whole", DECODE].positions == 16 * sum(range(2, LARGEST + 1))


def one_bit(completion, position):
    logprobs = completion.logprobs.clone()
    logprobs[position, 3] = torch.nextafter(logprobs[position, 3], torch.tensor(-math.inf))
    return replace(completion, logprobs=logprobs)


@pytest.mark.parametrize(
    ("key", "position", "place", "what", "where"),
    [
        (DECODE, 9, (LARGEST, 1), DECODE, "1 tokens, place 2 of 2"),
        (PROMPTS, 0, (6, 5), PROMPTS, "400 tokens, place 6 of 6"),
        (PROMPTS, -8, (6, 0), PROMPTS, "2 tokens, place 1 of 6"),  # the first token of the answer
        (PROMPTS, -7, (6, 0), AFTER, "2 tokens, place 1 of 6"),
        (PIECES, 5, (5, 0), PIECES, "400 tokens, place 1 of 1"),
    ],
)
def test_one_bit_is_noticed(checkpoint, tmp_path, key, position, place, what, where):
    def change(start, of, at, completion):
        return one_bit(completion, position) if (of, at) == (key, place) else completion

    rows = judged(checkpoint, tmp_path, change)
    differing = {row.what: row for row in rows.values() if row.verdict != "bitwise"}
    assert list(differing) == [what]
    row = differing[what]
    assert (row.differ, row.first, row.verdict) == (1, where, "not bitwise") and 0 < row.max < 1e-6
    assert "not bitwise" in table([row], COLUMNS)


def test_nothing_is_compared_behind_another_token(checkpoint, tmp_path):
    def change(start, of, at, completion):
        if (of, at) != (DECODE, (LARGEST, 1)):
            return completion
        said = list(completion.token_ids)
        said[4] = (said[4] + 1) % VOCAB
        return replace(one_bit(one_bit(completion, 4), 9), token_ids=tuple(said))

    row = judged(checkpoint, tmp_path, change)["whole", DECODE]
    assert row.differ == 1
    assert row.positions % 16 == 5


def test_a_start_that_failed_is_not_bitwise(checkpoint, tmp_path):
    planned = plan(checkpoint, "sglang", dtype="float32", draft_tokens=2, full=False, graphs=False, flags=("--x",))
    starts = [Start("sglang", checkpoint, c, runs, tmp_path / name) for name, (c, runs) in planned.starts.items()]
    assert starts[0].config.flags == ("--max-running-requests", "32", "--x") and starts[0].config.draft_tokens == 2
    rows = judge(starts, {"whole": "it broke"})
    assert [row.verdict for row in rows] == ["it broke", "not run", "not run", "not run"]
