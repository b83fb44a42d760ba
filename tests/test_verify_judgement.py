"""What `qnext verify` makes of answers: transformers stands for the engine, right and then wrong."""

import json
from dataclasses import replace

import pytest
import torch

from qnext_plugin.cli import main
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import Completion, Result
from qnext_plugin.verify.reference import Recorded, Whole
from qnext_plugin.verify.report import OK, notes, table
from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.runner import Start, passes
from qnext_plugin.verify.scenarios import Scenario, scenarios, tokens
from qnext_plugin.verify.starts import CASES, FULL_SET, plan
from qnext_plugin.verify.verification import gpu_environment, judge
from tests.support.checkpoints import write_checkpoint

PROMPT, LENGTH = tokens(9, seed=1), 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), "odd-d")


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """What transformers says to PROMPT, by dtype."""

    def answer(dtype):
        whole, ids = Whole(checkpoint, dtype), PROMPT
        for _ in range(LENGTH):
            (rows,) = whole([Query((*ids, 0), 1)])
            ids = (*ids, int(rows.likeliest[0]))
        (rows,) = whole([Query(ids, LENGTH)])
        return Completion(PROMPT, ids[len(PROMPT) :], rows.ids.long(), rows.logprobs)

    return {dtype: answer(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}


def judged(checkpoint, directory, completion, dtype="float32", others=None, requests=1, **scenario):
    config = EngineConfig(dtype=dtype)
    batch = Scenario(((PROMPT,) * requests,), **scenario)
    start = Start("vllm", checkpoint, config, passes(config, {"it": batch}), directory)
    directory.mkdir()
    if completion:
        answers = [completion, *[others or completion] * (requests - 1)]
        answers = [replace(each, ids=each.ids.clone(), logprobs=each.logprobs.clone()) for each in answers]
        Result([answers], num_preemptions=0, block_size=32).save(directory / "0.safetensors")
    failures = {} if completion else {directory.name: "it broke"}
    (row,) = judge([start], failures, Recorded(checkpoint))
    return row


def off(completion, by):
    logprobs = completion.logprobs.clone()
    logprobs[3, 7] += by
    return replace(completion, logprobs=logprobs)


def test_right_answers_are_ok(checkpoint, tmp_path, greedy):
    row = judged(checkpoint, tmp_path / "a", greedy["float32"])
    assert (row.verdict, row.difference.positions, row.difference.agreement) == (OK, LENGTH, 1)


@pytest.mark.parametrize(("by", "verdict"), [(9e-5, OK), (1.3e-4, "off by more than 0.0001")])
def test_float32_is_held_to_its_tolerance(checkpoint, tmp_path, greedy, by, verdict):
    row = judged(checkpoint, tmp_path / "a", off(greedy["float32"], by))
    assert (row.verdict, row.difference.worst) == (verdict, "batch 0 request 0 (9+24 tokens) position 11")


def test_bfloat16_is_held_to_what_transformers_is_off(checkpoint, tmp_path, greedy):
    row = judged(checkpoint, tmp_path / "a", greedy["bfloat16"], "bfloat16")
    assert row.verdict == OK and row.max_bound == pytest.approx(4 * row.difference.max) and row.max_bound < 1
    assert row.difference.usual < row.usual_bound < 2 * row.difference.usual
    assert judged(checkpoint, tmp_path / "b", off(greedy["bfloat16"], 2.0), "bfloat16").verdict.startswith("off by")
    said = greedy["bfloat16"]
    (exact,) = Whole(checkpoint, torch.float32)([Query((*PROMPT, *said.token_ids), LENGTH)])
    assert torch.equal(exact.ids, said.ids)

    def wrong(rows, times):
        logprobs = said.logprobs.clone()
        logprobs[rows] += (times - 1) * (said.logprobs - exact.logprobs)[rows]
        return replace(said, logprobs=logprobs)

    everywhere, somewhere = wrong(slice(None), 2.5), wrong(slice(0, 2), 2.5)
    assert judged(checkpoint, tmp_path / "c", everywhere, "bfloat16").verdict.endswith("nine positions in ten")
    assert judged(checkpoint, tmp_path / "d", somewhere, "bfloat16").verdict == OK


@pytest.mark.parametrize(("rows", "verdict"), [(12, "at most of 12 positions in a row"), (6, OK)])
def test_bfloat16_may_not_be_off_for_long(checkpoint, tmp_path, greedy, rows, verdict):
    """A wrong state stays wrong, in few of all positions; other experts are soon forgotten."""
    said = greedy["bfloat16"]
    right = judged(checkpoint, tmp_path / "a", said, "bfloat16", requests=8)
    logprobs = said.logprobs.clone()
    logprobs[4 : 4 + rows, 7] += 2 * right.difference.max
    row = judged(checkpoint, tmp_path / "b", replace(said, logprobs=logprobs), "bfloat16", said, requests=8)
    assert right.verdict == OK and row.verdict.endswith(verdict) and row.difference.max < row.max_bound


def test_wrong_token_is_a_failure(checkpoint, tmp_path, greedy):
    said = greedy["float32"]
    ids = (*said.token_ids[:-1], (said.token_ids[-1] + 1) % 256)
    row = judged(checkpoint, tmp_path / "a", replace(said, token_ids=ids))
    assert row.verdict == "1 tokens that the reference would not choose"


@pytest.mark.parametrize(
    ("scenario", "verdict"),
    [({"preempts": True}, "not exercised: no request was preempted"), ({"hits": ((0, 0),)}, "not exercised: batch 0")],
)
def test_scenario_that_did_nothing_is_not_ok(checkpoint, tmp_path, greedy, scenario, verdict):
    assert judged(checkpoint, tmp_path / "a", greedy["float32"], **scenario).verdict.startswith(verdict)


def test_failed_engine_is_a_row(checkpoint, tmp_path):
    row = judged(checkpoint, tmp_path / "a", None)
    assert row.verdict == "engine failed: it broke" and row.difference is None
    assert table([row]).splitlines()[-1].startswith("| a ") and notes([row]) == ["0 of 1 ok"]


def test_table_is_markdown_and_json_is_plain(checkpoint, tmp_path, greedy):
    row = judged(checkpoint, tmp_path / "a", greedy["float32"])
    lines = table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len({len(line) for line in lines}) == 1
    assert json.loads(json.dumps(row.as_json()))["difference"]["positions"] == LENGTH


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_plan_covers_every_scenario_and_fits_the_model(checkpoint, engine, draft_tokens):
    planned = plan(
        checkpoint, engine, dtype="float32", draft_tokens=draft_tokens, full=True, graphs=True, flags=["--x"]
    )
    assert not planned.too_long
    for config, runs in planned.starts.values():
        assert config.draft_tokens in (0, draft_tokens) and config.flags == ("--x",)
        assert runs and all(run.scenario.longest <= config.max_model_len <= 1024 for run in runs)
    planned_keys = {run.key.removesuffix(" again") for _, runs in planned.starts.values() for run in runs}
    names = FULL_SET[engine]
    expected = {
        key
        for name in names
        if bool(CASES[name].config.draft_tokens) <= bool(draft_tokens)
        for key in CASES[name].scenarios
    }
    assert planned_keys == expected


def test_prompts_use_the_whole_vocabulary_and_grow_with_the_blocks():
    small, large = scenarios(), scenarios(vocab_size=5000, scale=3)
    assert max(small["prefix_aba"].batches[0][0]) < 256 < 4000 < max(large["prefix_aba"].batches[0][0])
    assert len(large["prefix_aba"].batches[0][0]) == 3 * len(small["prefix_aba"].batches[0][0])
    assert large["prefix_aba"].longest == 3 * 600 + 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "DIR", "--engine", "none"], "invalid choice: 'none'"),
        (["verify", "DIR", "--engine", "vllm", "--quick", "--full"], "not allowed with"),
        (["checkpoint", "random", "DIR", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_engine_that_is_not_installed_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("qnext_plugin.cli.verify.find_spec", lambda name: None)
    assert main(["verify", str(tmp_path), "--engine", "sglang"]) == 2
    assert "sglang is not installed in this environment" in capsys.readouterr().err


def test_on_a_gpu_products_are_exact(monkeypatch):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    assert gpu_environment(EngineConfig()) == {"TRITON_F32_DEFAULT": "ieee"}
    assert gpu_environment(EngineConfig(dtype="bfloat16")) == {}
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")  # as the user wants it
    assert gpu_environment(EngineConfig()) == {}
