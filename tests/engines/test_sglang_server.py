"""The HTTP server with default arguments, through the `openai` client."""

import re

import httpx
import pytest
from openai import OpenAI

from qnext_plugin.engines import server
from qnext_plugin.engines.config import mtp_flags

pytestmark = pytest.mark.engine

MODEL = "qnext"
MESSAGES = [{"role": "user", "content": "Hello"}]
WHOLE = {"extra_body": {"ignore_eos": True}}  # as long as asked for, whatever random weights sample


@pytest.fixture(scope="module", params=[[], mtp_flags("sglang", 3)], ids=["plain", "nextn"])
def drafts(request):
    return request.param


@pytest.fixture(scope="module")
def log(drafts, tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(drafts, checkpoint, log):
    flags = [*drafts, "--served-model-name", MODEL]
    with server.serving("sglang", str(checkpoint("bfloat16")), flags, log) as running:
        yield OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_scheduler_says_which_classes_serve(client, drafts, log):
    text = log.read_text()
    assert re.search(r"qnext-plugin .*: Qwen3NextForCausalLM is served by sglang_ext\.model", text)
    served = re.search(r"qnext-plugin .*: Qwen3NextForCausalLMMTP is served by sglang_ext\.mtp", text)
    assert bool(served) == bool(drafts)


def test_streamed_chat_is_the_same_answer(client):
    greedy = {"max_tokens": 24, "temperature": 0, **WHOLE}
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **greedy)
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, **greedy, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert whole.usage.completion_tokens == 24
    assert streamed == whole.choices[0].message.content


def test_logprobs_are_of_the_tokens_returned(client):
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=6, temperature=0, logprobs=3, **WHOLE)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 6
    assert all(-20 < logprob <= 0 for logprob in logprobs.token_logprobs)
    # Tokens that are no whole character share a key, so that fewer than three may be left.
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 3 and max(top.values()) <= chosen


def test_several_answers(client):
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=1, n=3, **WHOLE)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 24


def test_grammar(client):
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=16, temperature=1, extra_body={"regex": "[a-d]{7}"}
    )
    assert re.fullmatch("[a-d]{7}", answer.choices[0].text)


def test_aborted_request_leaves_the_server_able(client):
    stream = client.completions.create(model=MODEL, prompt="abc", max_tokens=900, temperature=0, stream=True, **WHOLE)
    next(iter(stream))
    stream.close()
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=4, temperature=0, **WHOLE)
    assert answer.usage.completion_tokens == 4


def test_a_profile_can_be_taken(client, tmp_path):
    server = str(client.base_url).removesuffix("/v1/")
    settings = {"output_dir": str(tmp_path), "activities": ["CPU"], "with_stack": False}
    assert httpx.post(f"{server}/start_profile", json=settings, timeout=60).status_code == 200
    client.completions.create(model=MODEL, prompt="abc", max_tokens=2)
    assert httpx.post(f"{server}/stop_profile", timeout=60).status_code == 200
    assert list(tmp_path.rglob("*.trace.json.gz"))
