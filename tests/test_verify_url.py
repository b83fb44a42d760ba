"""What `qnext verify --url` makes of a server: a stub answers right, then wrong, then not at all."""

import json
from collections.abc import Callable

import pytest
import torch

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.cli import main
from qnext_plugin.engines.process import free_port
from qnext_plugin.verify.report import Row
from qnext_plugin.verify.rows import Rows
from qnext_plugin.verify.scenarios import scenarios
from qnext_plugin.verify.served import passed
from tests.support.stub_server import VOCAB, Stub, Table, serving

ENGINES = pytest.mark.parametrize("engine", ["vllm", "sglang"])
RIGHT = Table()
FEW = ("mixed_lengths", "short", "sampled", "prefix_chunked", "prompt_logprobs")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    small = {"linear_key_head_dim": 16, "linear_value_head_dim": 24}  # and so are vLLM's blocks
    write_random_checkpoint(
        directory, dtype="float32", overrides=small | {"vocab_size": VOCAB, "max_position_embeddings": 1024}
    )
    return directory


@pytest.fixture
def verify(checkpoint, tmp_path, monkeypatch, capsys):
    """Run the command on these servers, with RIGHT in the place of transformers, for its status, rows and output."""

    def run(*stubs: Stub, options: tuple[str, ...] = (), few: bool = True):
        if few:
            monkeypatch.setattr(
                "qnext_plugin.verify.served.scenarios",
                lambda *args: {name: scenario for name, scenario in scenarios(*args).items() if name in FEW},
            )
        monkeypatch.setattr("qnext_plugin.verify.reference.Recorded", lambda *_: RIGHT)
        file = tmp_path / "json"
        file.unlink(missing_ok=True)
        with serving(stubs[0]) as url, serving(stubs[-1]) as other:
            against = ["--against", other] if len(stubs) > 1 else []
            status = main(["verify", str(checkpoint), "--url", url, *against, "--json", str(file), *options])
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        out = capsys.readouterr()
        return status, {row["scenario"]: row["verdict"] for row in rows}, out.out + out.err

    return run


@ENGINES
def test_right_server(verify, engine):
    stub = Stub(engine, RIGHT)
    status, rows, printed = verify(stub, few=False)
    assert status == 0, printed
    idle = {name for name, verdict in rows.items() if verdict != "ok"}
    unknown = {"prompts in pieces"} if engine == "vllm" else set()  # there the longest prompt is longer than a step
    assert idle == {"drafts_in_every_pattern", "drafts_all_right"} | unknown, printed
    expected = {"mixed_lengths", "sampled", "prefix_aba again", "multi_turn", "aborts", "preemption"}
    assert expected | {"prompt_logprobs", "drafts_of_the_model"} <= rows.keys()
    assert "float32 (config.json; the server does not say)" in printed or engine == "sglang"
    assert "qnext-plugin serves: unknown" in printed and "log-probabilities of each position: 20 of 331" in printed
    assert stub.dropped == 3
    assert len(stub.seen) > 3  # salts: what has to be cold is


def nudge(by: float, place: int, after: int) -> Callable:
    """Change one log-probability of the answer with that many requests before it."""
    count = 0

    def change(prompt, rows):
        nonlocal count
        count += bool(rows)
        if count == after and rows:
            row = rows[place % len(rows)]
            token = sorted(row)[7 % len(row)]
            row[token] += by
        return rows

    return change


@ENGINES
@pytest.mark.parametrize(("by", "status"), [(-2e-4, 1), (5e-5, 0)])
def test_one_log_probability(verify, engine, by, status):
    found, rows, printed = verify(Stub(engine, RIGHT, change=nudge(by, 3, 20)))
    assert found == status, printed
    assert [verdict for verdict in rows.values() if verdict.startswith("off by")] == [
        "off by more than 0.0001"
    ] * status


def one_position_late(prompt, rows):
    return rows[:1] + rows[:-1]


def of_the_prompt_one_position_late(prompt, rows):
    return one_position_late(prompt, rows) if len(rows) > 24 else rows


@ENGINES
@pytest.mark.parametrize("change", [one_position_late, of_the_prompt_one_position_late])
def test_wrong_positions(verify, engine, change):
    status, rows, _ = verify(Stub(engine, RIGHT, change=change))
    assert status == 1 and rows["prompt_logprobs"] == "off by more than 0.0001"


def test_wrong_token(verify):
    """Whose distribution is right, so that nothing else shows it."""
    status, rows, _ = verify(Stub("vllm", RIGHT, choose=lambda logprobs: int(logprobs.topk(2).indices[1])))
    assert status == 1 and rows["mixed_lengths"].endswith("tokens that the reference would not choose")


def test_another_model_of_the_same_vocabulary(verify):
    status, rows, printed = verify(Stub("vllm", Table(seed=1)))
    assert status == 1 and rows["mixed_lengths"].startswith("off by")
    assert "the server probably serves another model than MODEL" in printed


def test_what_a_server_does_not_say_is_not_exercised(verify):
    stub = Stub("vllm", RIGHT, cached_tokens=False, metrics=False, prompt_logprobs=False)
    status, rows, printed = verify(stub, options=("--dtype", "float32"), few=False)
    assert status == 0 and rows["mixed_lengths"] == "ok", printed
    assert rows["prefix_aba"].endswith("vLLM does with --enable-prompt-tokens-details")
    assert rows["prompt_logprobs"] == "not exercised: the server gives no log-probabilities of prompts"
    assert rows["drafts_of_the_model"] == "not exercised: the server does not say whether it drafts"
    assert rows["preemption"] == "not exercised: the server does not say whether requests were preempted"
    assert f"{sum(v != 'ok' for v in rows.values())} not exercised" in printed


def test_what_the_start_rules_out_is_not_asked(verify):
    info = {"disable_radix_cache": True, "max_total_num_tokens": 10**6, "chunked_prefill_size": 8192}
    status, rows, _ = verify(Stub("sglang", RIGHT, info=info, drafts=False), few=False)
    assert status == 0
    assert rows["prefix_aba"] == "not exercised: the server has no prefix cache"
    assert rows["drafts_of_the_model"] == "not exercised: the server does not draft"
    assert rows["preemption"].startswith("not exercised: the server's cache holds 1000000 tokens")
    assert rows["prompts in pieces"].endswith("up to 8192 tokens in a step, and the longest prompt has 700")
    assert not any(name.endswith("again") for name in rows)


@pytest.mark.parametrize("engines", [("vllm", "sglang"), ("sglang", "vllm")])
def test_against_another_server(verify, engines):
    first, second = engines
    status, rows, printed = verify(Stub(first, RIGHT), Stub(second, RIGHT, max_logprobs=5))
    assert status == 0 and rows["prefix_chunked again"] == "ok", printed


@pytest.mark.parametrize("wrong", [{"change": nudge(3e-4, 3, 20)}, {"model": Table(seed=1)}])
def test_against_another_server_that_differs(verify, wrong):
    assert verify(Stub("vllm", RIGHT), Stub("sglang", **{"model": RIGHT} | wrong))[0] == 1


def test_against_in_bfloat16_what_the_second_is_off_itself_counts(verify):
    bfloat16 = ("--dtype", "bfloat16")
    assert verify(Stub("vllm", Table(off=0.02)), Stub("sglang", Table(off=0.02)), options=bfloat16)[0] == 0
    status, rows, _ = verify(Stub("vllm", Table(off=0.06)), Stub("sglang", Table(off=0.02)), options=bfloat16)
    assert status == 1 and rows["mixed_lengths"].startswith("off by more than")


def test_nothing_that_agrees_is_no_success():
    idle, ok = Row("server", "a", "not exercised: so it is"), Row("server", "b", "ok")
    assert (
        not passed([]) and not passed([idle]) and passed([idle, ok]) and not passed([ok, Row("server", "c", "not run")])
    )


def test_token_that_only_one_side_names_is_off_by_what_it_exceeds_the_others():
    kept = Rows(torch.tensor([[2, 5]]).int(), torch.tensor([[-1.0, -2.0]]), torch.ones(1))
    found = kept.closest(torch.tensor([[5, 7, 9]]), torch.tensor([[-2.5, -1.5, -3.0]]))
    assert found.tolist() == [[-2.0, -2.0, -3.0]]


@ENGINES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Table(VOCAB - 10)}, "MODEL has 331 token ids, and the server refuses the last of them"),
        ({"model": Table(VOCAB + 40)}, "and MODEL has 331: another vocabulary"),
        ({"max_logprobs": 0}, "the server gives no log-probabilities"),
        ({"key": "secret"}, "status 401: Unauthorized; the key is read from OPENAI_API_KEY"),
        (
            {"change": lambda prompt, rows: rows[1:]},
            "an answer cannot be judged: expected 24 tokens and 0 of the prompt",
        ),
        ({"change": lambda prompt, rows: [{i: 9.0 for i in row} for row in rows]}, "are above 0"),
        ({"fail_after": 30}, "status 500: EngineCore died"),
    ],
)
def test_server_that_cannot_be_judged(verify, engine, changes, message):
    status, rows, printed = verify(Stub(engine, **{"model": RIGHT} | changes))
    assert message in printed and "Traceback" not in printed
    assert status == (1 if rows else 2)


def test_key_is_sent(verify, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert verify(Stub("sglang", RIGHT, key="secret"))[0] == 0


def test_server_that_stays_silent(verify, monkeypatch):
    monkeypatch.setattr("qnext_plugin.engines.client.Client.timeout", 0.3)
    monkeypatch.setattr("qnext_plugin.engines.client.Client.__init__.__defaults__", (0.3,))
    status, _, printed = verify(Stub("vllm", RIGHT, silent=True))
    assert status == 2 and "no answer: timed out" in printed


def test_another_architecture(verify):
    status, _, printed = verify(Stub("sglang", RIGHT, info={"architectures": ["LlamaForCausalLM"]}))
    assert status == 2 and "serves LlamaForCausalLM, and MODEL is Qwen3NextForCausalLM" in printed


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://127.0.0.1:{free_port()}", "no answer: [Errno 111] Connection refused"),
        ("127.0.0.1:8000", "'127.0.0.1:8000' is not the address of a server"),
        ("http://no-such-host.invalid", "no answer: "),
    ],
)
def test_nobody_there(checkpoint, capsys, url, message):
    assert main(["verify", str(checkpoint), "--url", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_something_else_there(checkpoint, capsys):
    with serving(Stub("neither", RIGHT)) as url:
        assert main(["verify", str(checkpoint), "--url", f"{url}/v1/"]) == 2
    assert f"{url}: neither vLLM nor SGLang answers there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://a", "--full"], "--full: only for an engine that verify starts"),
        (["--url", "http://a", "--tp-size", "4"], "--tp-size 4: only for an engine that verify starts"),
        (["--url", "http://a", "--mtp", "2", "--native"], "--mtp, --native: only for"),
        (["--engine", "vllm", "--against", "http://a"], "--against needs --url"),
    ],
)
def test_options_that_do_not_go_together(checkpoint, capsys, options, message):
    assert main(["verify", str(checkpoint), *options]) == 2
    assert message in capsys.readouterr().err
