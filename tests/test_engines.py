"""Engines in processes of their own: the protocol, who serves, and MTP on command lines; no engine starts."""

import os
import time
from pathlib import Path

import pytest

from qnext_plugin.bench import side
from qnext_plugin.bench.side import Task
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines import process, remote, server
from qnext_plugin.engines.config import EngineConfig, mtp_arguments, mtp_flags
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.engines.who_serves import check_log, check_modules
from qnext_plugin.verify.runner import Run, Start
from qnext_plugin.verify.scenarios import Scenario

OURS = "INFO qnext-plugin 1.0: Qwen3NextForCausalLM is served by vllm_ext.model\n"
DRAFT = "INFO qnext-plugin 1.0: Qwen3NextMTP is served by vllm_ext.mtp\n"


def held(start: int) -> list[int]:
    """Stands for an engine."""
    return [start]


def add(engine: list[int], number: int) -> int:
    engine[0] += number
    return engine[0]


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def fail(message: str) -> None:
    raise ValueError(message)


@pytest.fixture
def worker(tmp_path):
    with remote.started(tmp_path / "worker", {"QNEXT_TEST": "set"}) as worker:
        yield worker


def test_calls_are_answered_in_order_with_what_is_held_as_the_first_argument(worker):
    before = time.time()
    assert worker.call("os:getenv", 60, key="QNEXT_TEST") == "set"
    start = worker.send("tests.test_engines:held", hold=True, start=5)
    first, second = (worker.send("tests.test_engines:add", number=number) for number in (1, 2))
    assert worker.receive(second, 60)[0] == 8
    assert worker.receive(first, 60)[0] == 6
    assert before < worker.receive(start, 60)[1] < time.time()


def test_an_exception_ends_the_process_and_is_the_reason(worker):
    with pytest.raises(EngineFailed, match="in a test") as e:
        worker.call("tests.test_engines:fail", 60, message="broken in a test")
    assert e.value.reason == "ValueError: broken in a test" and "Traceback" in str(e.value)
    with pytest.raises(EngineFailed, match="in a test"):
        worker.call("os:getenv", 60, key="PATH")


def test_a_call_that_takes_too_long(worker):
    with pytest.raises(EngineFailed, match="still running after 3 s"):
        worker.call("tests.test_engines:sleep", 3, seconds=60)


def test_a_process_that_has_ended_is_noticed_but_what_it_did_before_counts(tmp_path):
    log, made = tmp_path / "log", tmp_path / "made"
    with process.started(["-c", f"open({str(made)!r}, 'w'); print('done')"], log) as child:
        process.wait_until(made.exists, child, log, 60)
        child.wait(60)
        process.wait_until(made.exists, child, log, 60)
        with pytest.raises(EngineFailed, match="status 0: done"):
            process.wait_until((tmp_path / "other").exists, child, log, 60)


FAKE, FAKE_MODULE = "tests.support.fake", "tests.support.fake_ext.tools.engine"


def test_a_start_answers_its_runs_and_says_who_serves(tmp_path):
    scenario, lines = Scenario((((1, 2, 3), (4,)),), max_tokens=(2,)), []
    start = Start(FAKE, tmp_path, EngineConfig(), [Run("a", scenario), Run("b", scenario)], tmp_path / "start")
    start.run(60, lines.append)
    assert [[c.token_ids for c in batch] for batch in start["b"].batches] == [[(3, 3), (1, 1)]]
    assert start.serving == {"modules": [FAKE_MODULE], "kernels": [], "memory": {"resets": 2}}
    assert [line.split(":")[0] for line in lines] == ["start start", "start a", "start b"] and FAKE_MODULE in lines[0]


def test_what_a_start_answered_before_it_failed_can_be_read(tmp_path):
    scenario = Scenario((((1,),),), max_tokens=(2,))
    runs = [Run("a", scenario), Run("broken", scenario, mutant="m"), Run("never", scenario)]
    start = Start(FAKE, tmp_path, EngineConfig(), runs, tmp_path / "start")
    with pytest.raises(EngineFailed) as e:
        start.run(60)
    assert e.value.reason == "ValueError: no mutant m"
    assert [run.key in start for run in runs] == [True, False, False]


def test_another_model_than_ours_is_an_error(tmp_path):
    with remote.started_engine(
        FAKE, "model", EngineConfig(), tmp_path / "engine", arguments={"module": "other.model"}
    ) as engine:
        assert 0 < engine.ready(60) < 60
        with pytest.raises(EngineFailed, match=r"\['other.model'\] serve, expected classes of tests.support.fake_ext"):
            engine.serving(60)


class Unflagged(Task):
    def flags(self, engine: str) -> list[str]:
        return []


def test_a_side_is_measured_offline_each_time_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(side.POOLS, FAKE, {})
    write_random_checkpoint(tmp_path / "model", overrides={"num_hidden_layers": 4})
    workloads = {"prefill": {"batch": 2, "length": 8}, "decode": {"batch": 2, "length": 4, "output": 6}}
    task = Unflagged(str(tmp_path / "model"), workloads)
    with side.offline(side.Side("ours", FAKE), task, tmp_path / "side") as measure:
        first, second = measure(), measure()
    assert first["workloads"] == second["workloads"]
    assert first["workloads"]["prefill"] == {"tokens per second": 16.0}
    assert first["workloads"]["decode"]["tokens per second"] == 2.0
    assert (first["modules"], first["ranks"], first["first request seconds"]) == ([FAKE_MODULE], 1, 1.0)
    assert first["start-up seconds"] > 0 and first["peak resident bytes"] > 2**20


@pytest.mark.parametrize(
    ("modules", "native", "words"),
    [
        (["vllm_ext.model", "vllm_ext.mtp"], False, None),
        (["vllm.models.x"], True, None),
        ([], False, "no classes serve, expected classes of vllm_ext"),
        ([], True, "no classes serve"),
        (["vllm_ext.model", "vllm.models.x"], False, "expected classes of vllm_ext"),
        (["vllm_ext.model"], True, r"\['vllm_ext.model'\] serve, expected classes of vllm\."),
    ],
)
def test_the_classes_that_serve_are_those_asked_for(tmp_path, modules, native, words):
    (tmp_path / "log").touch()
    if words is None:
        check_modules(modules, "vllm", native, tmp_path / "log")
        return
    with pytest.raises(EngineFailed, match=words):
        check_modules(modules, "vllm", native, tmp_path / "log")


def test_a_server_says_in_its_log_which_classes_serve(tmp_path):
    log = tmp_path / "log"
    log.write_text("starting\n" + OURS + DRAFT)
    assert check_log("vllm", False, log) == {"Qwen3NextForCausalLM": "vllm_ext.model", "Qwen3NextMTP": "vllm_ext.mtp"}
    with pytest.raises(EngineFailed, match="expected classes of vllm"):
        check_log("vllm", True, log)
    log.write_text("starting\n")
    assert check_log("vllm", True, log) == {}
    with pytest.raises(EngineFailed, match="no classes serve"):
        check_log("vllm", False, log)


def test_mtp_is_the_same_in_arguments_and_flags():
    assert mtp_arguments("vllm", 0) == {} and mtp_flags("sglang", 0) == []
    assert mtp_flags("vllm", 2) == ["--speculative-config", '{"method":"qwen3_next_mtp","num_speculative_tokens":2}']
    flags = mtp_flags("sglang", 2)
    assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
        "--speculative-algorithm": "NEXTN",
        "--speculative-num-steps": "2",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "3",
    }
    assert mtp_arguments("sglang", 3, tree=10)["speculative_num_draft_tokens"] == 10


@pytest.fixture
def fake_engine(tmp_path, monkeypatch):
    """A server in place of an engine's, whose model is what it does at the start."""
    code = (
        "import http.server, os, sys; exec(sys.argv[1]); port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', port), Handler).serve_forever()"
    )
    monkeypatch.setitem(server.COMMANDS, "vllm", ("-c", code))
    return tmp_path / "log"


def test_a_server_is_ended_with_what_it_started(fake_engine):
    model = "import subprocess; print('child', subprocess.Popen(['sleep', '600']).pid, flush=True)"
    with server.serving("vllm", model, [], fake_engine, timeout=60) as running:
        assert server.is_healthy(running.url) and running.log == fake_engine
        child = int(fake_engine.read_text().split()[1])
        os.kill(child, 0)
    assert not server.is_healthy(running.url)
    state = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_ends_says_why(fake_engine):
    waited = []
    with (
        pytest.raises(EngineFailed) as e,
        server.serving("vllm", "raise ValueError('no memory')", [], fake_engine, timeout=60, waiting=waited.append),
    ):
        pass
    assert e.value.reason == "ValueError: no memory" and waited == sorted(waited)


def test_another_server_on_the_port_is_not_taken_for_ours(fake_engine, tmp_path):
    with (
        server.serving("vllm", "", [], fake_engine, timeout=60) as first,
        pytest.raises(ValueError, match="another server answers on port"),
        server.serving("vllm", "", [], tmp_path / "second", port=int(first.url.rpartition(":")[2])),
    ):
        pass
