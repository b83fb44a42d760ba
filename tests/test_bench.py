"""`qnext bench`: what is counted, divided and refused; engines/test_bench.py measures a real engine."""

import dataclasses
import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import step, tables
from qnext_plugin.bench import report
from qnext_plugin.bench.side import Side, Task
from qnext_plugin.bench.worker import Answered, given_prompts, measure, random_prompts
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.cli import main


def test_rates_exclude_the_warm_up_and_the_prompt():
    asked = []

    def answer(prompts, num_tokens):
        """Of an engine that takes 2 s for a prompt and 0.5 s for a step of 2 tokens; the first time 100 s more."""
        new = (len(prompts), num_tokens) not in asked
        asked.append((len(prompts), num_tokens))
        steps = (num_tokens - 1) / 2
        return Answered(2 + 0.5 * steps + 100 * new, [[7] * num_tokens] * len(prompts), len(prompts) * int(steps))

    workloads = {"prefill": {"batch": 3, "length": 10}, "decode": {"batch": 2, "length": 5, "output": 8}}
    found = measure(answer, random_prompts(50), random_prompts(50), workloads)
    assert found["prefill"] == {"tokens per second": 3 * 10 / 2}
    assert found["decode"] == {"tokens per second": 2 * 8 / 2, "tokens per step": 2.0, "looping": 0}


def test_random_prompts_never_repeat_and_given_ones_do():
    drawn = random_prompts(100)
    prompts = {tuple(prompt) for _ in range(5) for prompt in drawn(4, 9)}
    assert len(prompts) == 20 and {len(prompt) for prompt in prompts} == {9}
    assert given_prompts([[1], [2, 3]])(3, 77) == [[1], [2, 3], [1]]


def side_found(rate: float, steps: float) -> dict:
    decode = {"tokens per second": 2 * rate, "tokens per step": steps, "looping": 1}
    return {"workloads": {"prefill 2x9": {"tokens per second": rate}, "decode batch 3": decode}}


PAIRS = [
    {"ours": side_found(30, 1.5), "native": side_found(10, 1.0)},
    {"ours": side_found(20, 2.5), "native": side_found(20, 1.0)},
    {"ours": side_found(40, 2.0), "native": side_found(20, 2.0)},
]


def reported() -> report.Report:
    workloads = report.summary(PAIRS)
    report.add_acceptance(workloads, draft_tokens=2)
    workloads["prefill 2x9"]["limit"] = {"ours": 60.0, "native": 80.0}
    return report.Report(
        kind="offline",
        command="qnext bench M",
        model="M",
        machine="two cores",
        date="2026-01-01",
        sides=["ours", "native"],
        engines={"ours": "vllm 0", "native": "vllm 0"},
        modules={"ours": ["vllm_ext.model"], "native": ["vllm.model"]},
        ranks=1,
        dtype="bfloat16",
        mtp=2,
        ceilings={"read": 5e9, "copy": 3e9, "gemm": 2e11},
        about={"peak resident bytes": {"ours": [2**30, 3 * 2**30], "native": [2**31]}},
        workloads=workloads,
    )


def test_ratio_is_the_median_of_those_of_each_pair():
    row = reported().workloads["prefill 2x9"]
    assert (row["ours"], row["native"], row["ratio"]) == ([30, 20, 40], [10, 20, 20], 2.0)
    assert row["ratio"] != statistics.median(row["ours"]) / statistics.median(row["native"])
    assert report.spread(row, ["ours", "native"]) == "2.00 (1.00-3.00)"


def test_acceptance_leaves_out_the_token_that_is_no_draft():
    row = reported().workloads["decode batch 3"]
    assert row["acceptance"] == {"ours": [0.25, 0.75, 0.5], "native": [0.0, 0.0, 0.5]}


def test_text_has_the_limit_next_to_the_figure():
    lines = report.text(reported()).splitlines()
    cells = [line.split() for line in lines]
    assert cells[1] == ["prefill", "2x9", "30.0", "20.0", "2.00", "(1.00-3.00)", "60", "/", "80", "50%", "25%"]
    assert cells[2][-4:] == ["2.00", "1.00", "0.50", "0.00"]
    assert "peak resident: ours 2.00 GiB, native 2.00 GiB" in lines
    assert "reached here: 5.0 GB/s read, 3.0 GB/s copied, 200 GFLOP/s in bfloat16" in lines


def test_one_side_alone_has_no_ratio():
    alone = report.summary([{"ours": pair["ours"]} for pair in PAIRS])
    assert alone["prefill 2x9"] == {"ours": [30, 20, 40]}
    assert "ratio" not in report.text(dataclasses.replace(reported(), sides=["ours"], workloads=alone))


def test_chart(tmp_path):
    pytest.importorskip("matplotlib", reason="only --plot needs it")
    report.plot(reported(), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert drawn.count("stroke-dasharray") >= 2  # the limits


def test_every_prompt_batch_fits_in_one_step_and_drafts_behind_the_last_token():
    workloads = {"p": {"batch": 7, "length": 500}, "d": {"batch": 9, "length": 30, "output": 20}}
    task = Task("m", workloads, draft_tokens=2)
    flags = task.flags("vllm")
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    assert given["--max-num-seqs"] == "9" and given["--max-num-batched-tokens"] == "3500"
    assert given["--max-model-len"] == str(500 + 1 + 32)
    assert "--no-enable-prefix-caching" in flags and "qwen3_next_mtp" in flags[-1]
    assert Task("m", workloads, prompts=[[1] * 600]).longest == 600 + 20 + 1 + 32


@pytest.mark.parametrize("native", [False, True])
def test_the_native_side_turns_this_plugin_off(native):
    assert Side("x", "sglang", native).environment["QNEXT_DISABLE"] == str(int(native))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    write_random_checkpoint(directory, overrides={"max_position_embeddings": 512})
    return str(directory)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "sglang"], "does not run without an accelerator; measure ours with --against none"),
        (["--engine", "vllm", "--dtype", "float32"], "in bfloat16 only on a CPU, not in float32"),
        (["--engine", "vllm", "--against", "sglang"], "give --against-python the one it is in"),
        (["--engine", "vllm", "--mtp", "8"], "--mtp is 8, expected 0 to 7"),
        (["--engine", "vllm", "--prefill", "--batch"], "nothing to measure"),
        (["--engine", "vllm", "--prefill", "2x512"], "sequences of 545 tokens, and the model takes 512"),
        (["--engine", "vllm", "--prefill", "2x9", "--input-len", "500"], "sequences of 565 tokens"),
        (["--engine", "vllm", "--prompts", "/dev/null"], "/dev/null: no prompts"),
        (["--engine", "vllm", "--plot", "chart.png"], "--plot needs matplotlib, which is not installed"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(monkeypatch, capsys, tiny, options, words):
    monkeypatch.setattr("qnext_plugin.cli.bench.find_spec", lambda name: name == options[1])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", tiny, *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--prefill", "512"], ["--prefill", "0x5"], ["--batch", "-1"], ["--pairs", "0"]])
def test_sizes_that_are_none(capsys, options):
    with pytest.raises(SystemExit):
        main(["bench", "MODEL", "--engine", "vllm", *options])
    assert "qnext bench: error: argument" in capsys.readouterr().err


def test_an_engine_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("qnext_plugin.cli.bench.find_spec", lambda name: None)
    assert main(["bench", "MODEL", "--engine", "vllm"]) == 2
    assert "run qnext with the engine's own python" in capsys.readouterr().err


@pytest.mark.parametrize("logits_apart", [True, False])  # vLLM's models, and SGLang's
def test_a_step_is_the_models_time_and_the_engines_around_it(monkeypatch, tmp_path, logits_apart):
    now = 0.0

    def passes(seconds, result):
        nonlocal now
        now += seconds
        return result

    monkeypatch.setattr(step.time, "perf_counter", lambda: now)
    monkeypatch.setenv(step.OUT, str(tmp_path / "passes"))
    model = SimpleNamespace(forward=lambda input_ids: passes(len(input_ids) + (not logits_apart), "hidden states"))
    if logits_apart:
        model.compute_logits = lambda hidden_states: passes(1, "logits")
    with step.stopwatch(SimpleNamespace(model_runner=SimpleNamespace(model=model))):
        for rows, following in (
            (6, 2),
            (2, 6),
            (6, 2),
            (2, 2),
            (2, 6),
            (6, 0),
        ):  # prompts of six tokens, decodes of two
            assert model.forward(input_ids=[0] * rows) == "hidden states"
            assert not logits_apart or model.compute_logits("hidden states") == "logits"
            passes(20 if following == 6 else 4, None)  # a pause before each prompt
    found = json.loads((tmp_path / "passes").read_text())
    assert step.decode(found, 2) == {"model ms": 3000.0, "step ms": 7000.0}
    with pytest.raises(AssertionError, match="no two passes over 3 tokens"):
        step.decode(found, 3)


def test_the_passes_over_a_batch_of_prompts_are_one_prefill():
    passes = [(2, 0.0, 7.0), (4, 0.0, 2.0), (6, 0.0, 8.0), (4, 0.0, 3.0), (2, 0.0, 4.0)]
    assert step.prefill(passes, batch=3, length=2, rate=0.5) == {"model ms": 7000.0, "step ms": 12000.0}
    with pytest.raises(AssertionError, match="4 tokens more than batches of 6"):
        step.prefill(passes[:-1], batch=3, length=2, rate=0.5)


def test_readme_tables():
    prefill = {"prefill 2x9": reported().workloads["prefill 2x9"]}
    made = tables.bench(dataclasses.replace(reported(), workloads=prefill).as_json())
    assert "| Workload | ours | vLLM's own | ratio | ours, share of its limit |" in made
    assert "| prefill 2x9 | 30 | 20 | 2.00 (1.00-3.00) | 50% |" in made
    parts = {"limit ms": 10.0, "model ms": [12.0, 14.0], "step ms": [16.0, 18.0], "llama.cpp ms": [20.0, 21.0]}
    assert "| decode | 10.0 | 13.0 | 1.30 | 4.0 | 17.0 | 20.5 |" in tables.decode_steps({"decode": parts})
    times = {"sglang": {"model ms": [20.0, 10.0], "step ms": [30.0, 30.0]}, "vllm": {"model ms": [20.0, 8.0]}}
    times["vllm"]["step ms"] = [15.0, 30.0]
    assert "| decode | 15.0 | 30.0 | 14.0 | 22.5 | 0.90 (0.80-1.00) | 0.75 (0.50-1.00) |" in tables.engines(
        {"times": {"decode": times}}
    )
    steps = {
        "gated attention": {"1024": [50.0, 70.0, 50.0], "32768": [400.0, 500.0, 300.0]},
        "experts": {"1024": [10.0, 20.0, 10.0], "32768": [10.0, 20.0, 20.0]},
    }
    made = tables.context({"microseconds by context": steps})
    assert "| us per layer | 1,024 tokens | 32,768 tokens | growth |" in made
    assert "| gated attention | 50 | 400 | 7.14 |" in made
    record = {
        "forms": {"4 bits": {"ours": ["w4a16"], "llama.cpp": ["Q4_0", "IQ4_NL"]}},
        "bytes": {"w4a16": 1.5e9, "Q4_0": 1.4e9, "IQ4_NL": 1.4e9},
        "errors": {"w4a16": 0.25, "Q4_0": 0.5, "IQ4_NL": 0.5},
        "workloads": {"decode": {"w4a16": [30.0, 20.0], "Q4_0": [10.0, 20.0], "IQ4_NL": [20.0, 10.0]}},
    }
    made = tables.quantized(record)  # the fastest of llama.cpp's is another one in each pair
    assert "| 4 bits: ours, w4a16 | 1.50 | 0.250 | 25.0 |" in made
    assert "| 4 bits: w4a16 | 1.25 (1.00-1.50) |" in made
    agrees = {"verdict": "ok", "difference": {"max": 5e-5, "usual": 1e-5}, "max_bound": 1e-4, "usual_bound": 1e-4}
    run = {"dtype": "float32", "native": False, "versions": {"vllm": "1"}}
    run["rows"] = [agrees, {"verdict": "engine failed", "difference": None}]
    assert "| vLLM, float32 | 1 of 2 | 50% |" in tables.agreement([run])


def test_a_command_that_is_terminated_stops_what_it_has_started():
    code = """
import os, signal
from argparse import Namespace
from types import SimpleNamespace
from qnext_plugin import cli

def run(args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("stopped")

cli.parser = lambda: SimpleNamespace(parse_known_args=lambda argv: (Namespace(run=run), []))
cli.main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (143, "stopped\n"), found.stderr
