"""The HTTP server without drafts, and with them, through the `openai` client."""

import re

import httpx
import pytest

from tests.support.serving import NAME

pytestmark = pytest.mark.parametrize("server", ["crowded", "demo"], indirect=True)

MESSAGES = [{"role": "user", "content": "Hello"}]
WHOLE = {"extra_body": {"ignore_eos": True}}  # as long as asked for, whatever the weights say


def test_scheduler_says_which_classes_serve(server, request):
    text = server.log.read_text()
    assert re.search(r"qnext-plugin .*: Qwen3NextForCausalLM is served by sglang_ext\.model", text)
    served = re.search(r"qnext-plugin .*: Qwen3NextForCausalLMMTP is served by sglang_ext\.mtp", text)
    assert bool(served) == (request.node.callspec.params["server"] == "demo")


def test_streamed_chat_is_the_same_answer(server):
    extra = WHOLE["extra_body"] | {"chat_template_kwargs": {"enable_thinking": False}}
    greedy = {"max_tokens": 24, "temperature": 0, "extra_body": extra}
    whole = server.chat(MESSAGES, **greedy)
    chunks = server.chat(MESSAGES, **greedy, stream=True)
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert whole.usage.completion_tokens == 24
    assert streamed == whole.choices[0].message.content


def test_logprobs_are_of_the_tokens_returned(server):
    answer = server.client.completions.create(
        model=NAME, prompt="abc", max_tokens=6, temperature=0, logprobs=3, **WHOLE
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 6
    assert all(-20 < logprob <= 0 for logprob in logprobs.token_logprobs)
    # Tokens that are no whole character share a key, so that fewer than three may be left.
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 3 and max(top.values()) <= chosen


def test_grammar(server):
    answer = server.client.completions.create(
        model=NAME, prompt="abc", max_tokens=16, temperature=1, extra_body={"regex": "[a-d]{7}"}
    )
    assert re.fullmatch("[a-d]{7}", answer.choices[0].text)


def test_aborted_request_leaves_the_server_able(server):
    stream = server.client.completions.create(
        model=NAME, prompt="abc", max_tokens=400, temperature=0, stream=True, **WHOLE
    )
    next(iter(stream))
    stream.close()
    answer = server.client.completions.create(model=NAME, prompt="abc", max_tokens=4, temperature=0, **WHOLE)
    assert answer.usage.completion_tokens == 4


def test_a_profile_can_be_taken(server, tmp_path):
    settings = {"output_dir": str(tmp_path), "activities": ["CPU"], "with_stack": False}
    assert httpx.post(f"{server.url}/start_profile", json=settings, timeout=60).status_code == 200
    server.client.completions.create(model=NAME, prompt="abc", max_tokens=2)
    assert httpx.post(f"{server.url}/stop_profile", timeout=60).status_code == 200
    assert list(tmp_path.rglob("*.trace.json.gz"))
