"""`qnext verify --url` of a server that runs, of one whose answers are changed on the way, and of another model."""

import json

import pytest

from qnext_plugin.cli import main
from qnext_plugin.verify.scenarios import scenarios
from tests.support.installed import ENGINE
from tests.support.proxy import in_front_of

CROWDED = pytest.mark.parametrize("server", ["crowded"], indirect=True)
DEMO = pytest.mark.parametrize("server", ["demo"], indirect=True)


@pytest.fixture
def verify(monkeypatch, tmp_path, capsys):
    """Ask about these scenarios only; returns the status, the rows by scenario and the output."""

    def run(model, url, *options, few):
        monkeypatch.setattr(
            "qnext_plugin.verify.served.scenarios",
            lambda *args: {name: scenario for name, scenario in scenarios(*args).items() if name in few},
        )
        file = tmp_path / "json"
        file.unlink(missing_ok=True)
        status = main(["verify", str(model), "--url", url, "--json", str(file), *options])
        out = capsys.readouterr()
        print(out.out, out.err)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        return status, {row["scenario"]: row for row in rows}, out.out + out.err

    return run


@CROWDED
def test_float32_under_pressure(server, checkpoint, verify):
    few = ("short", "arrivals", "aborts", "preemption", "prompt_logprobs", "sampled", "drafts_of_the_model")
    status, rows, printed = verify(checkpoint("tiny"), server.url, "--dtype", "float32", few=few)
    assert status == 0
    unlike = {name: row["verdict"] for name, row in rows.items() if row["verdict"] != "ok"}
    print(unlike)
    assert rows.keys() - unlike.keys() >= {"short", "arrivals", "aborts", "preemption", "prompt_logprobs"}
    assert f"{ENGINE} " in printed and "log-probabilities of each position: " in printed


@CROWDED
@pytest.mark.parametrize("against", [False, True])
def test_one_changed_log_probability(server, checkpoint, verify, against):
    answers = 0

    def change(answer):
        nonlocal answers
        if ENGINE == "vllm":
            rows = (answer["choices"][0]["logprobs"] or {}).get("top_logprobs", [])
        else:
            rows = answer["meta_info"].get("output_top_logprobs", [])
        answers += len(rows) == 8
        if answers == 2 and len(rows) == 8:  # the second answer of the scenario
            if ENGINE == "vllm":
                token = sorted(rows[3])[2]
                rows[3][token] += 3e-4
            else:
                rows[3][2][0] += 3e-4

    options = ("--dtype", "float32", *(("--against", server.url) if against else ()))
    assert verify(checkpoint("tiny"), server.url, *options, few=("short",))[0] == 0
    with in_front_of(server.url, change) as url:
        status, rows, _ = verify(checkpoint("tiny"), url, *options, few=("short",))
    assert status == 1 and rows["short"]["verdict"] == "off by more than 0.0001"
    assert rows["short"]["difference"]["max"] == pytest.approx(3e-4, rel=0.2)


@CROWDED
def test_another_model_of_the_same_dimensions(server, checkpoint, verify):
    status, _, printed = verify(checkpoint("odd-d"), server.url, "--dtype", "float32", few=("short",))
    assert status == 1 and "the server probably serves another model than MODEL" in printed


@DEMO
def test_bfloat16_with_drafts_and_prefixes(server, checkpoint, verify):
    few = ("mixed_lengths", "prefix_aba", "drafts_of_the_model")
    status, rows, printed = verify(checkpoint("demo"), server.url, few=few)
    assert status == 0
    # What is asked again is ok only where prefixes came from the cache.
    assert {rows[f"{name}{again}"]["verdict"] for name in few for again in ("", " again")} == {"ok"}
    assert "in bfloat16 (" in printed
