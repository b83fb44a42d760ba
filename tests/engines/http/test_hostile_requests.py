"""Requests that no client should send: a clean answer to each, and to everyone else's meanwhile."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.scenarios import tokens
from tests.support.installed import ENGINE
from tests.support.references import TOLERANCE, whole
from tests.support.requests import Request, error
from tests.support.serving import MAX_LEN

pytestmark = pytest.mark.parametrize("server", ["crowded"], indirect=True)

COMPLETION = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
IMPOSSIBLE = {"type": "object", "required": ["a"], "properties": {"a": False}}


def body(changes, of=COMPLETION):
    return json.dumps(of | changes).encode()


def said(content):
    return body({"messages": [{"role": "user", "content": content}]}, CHAT)


def schema(of):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}


CASES = {
    "empty prompt": (COMPLETIONS, body({"prompt": ""})),
    "no tokens": (COMPLETIONS, body({"prompt": []})),
    "no prompt": (COMPLETIONS, b'{"model": "m"}'),
    "prompt of another kind": (COMPLETIONS, body({"prompt": {"a": 1}})),
    "context too long": (COMPLETIONS, body({"prompt": list(tokens(MAX_LEN + 50, 1))})),
    "text too long": (COMPLETIONS, body({"prompt": "word " * 100_000})),
    "answer too long": (COMPLETIONS, body({"max_tokens": 10**9})),
    "id past the vocabulary": (COMPLETIONS, body({"prompt": [1, 10**6, 2]})),
    "id past 64 bits": (COMPLETIONS, body({"prompt": [1, 2**70]})),
    "negative id": (COMPLETIONS, body({"prompt": [1, -1, 2]})),
    "negative length": (COMPLETIONS, body({"max_tokens": -5})),
    "no answers": (COMPLETIONS, body({"n": 0})),
    "negative answers": (COMPLETIONS, body({"n": -1})),
    "absurd answers": (COMPLETIONS, body({"n": 10**9})),
    "negative logprobs": (COMPLETIONS, body({"logprobs": -7})),
    "absurd logprobs": (COMPLETIONS, body({"logprobs": 10**6})),
    "negative temperature": (COMPLETIONS, body({"temperature": -1})),
    "temperature not a number": (COMPLETIONS, body({}).replace(b'"temperature": 0', b'"temperature": NaN')),
    "infinite temperature": (COMPLETIONS, body({}).replace(b'"temperature": 0', b'"temperature": Infinity')),
    "top_p above one": (COMPLETIONS, body({"top_p": 5})),
    "negative top_k": (COMPLETIONS, body({"top_k": -9})),
    "penalty out of range": (COMPLETIONS, body({"presence_penalty": 1e9})),
    "bias on an id past the vocabulary": (COMPLETIONS, body({"logit_bias": {"1000000": 1}})),
    "bias on no id": (COMPLETIONS, body({"logit_bias": {"x": 1}})),
    "absurd stop list": (COMPLETIONS, body({"stop": [f"s{i}" for i in range(20_000)]})),
    "empty stop": (COMPLETIONS, body({"stop": [""]})),
    "stop of another kind": (COMPLETIONS, body({"stop": [[1]]})),
    "stop id past the vocabulary": (COMPLETIONS, body({"stop_token_ids": [10**6, -1]})),
    "unknown model": (COMPLETIONS, body({"model": "nobody"})),
    "broken UTF-8": (COMPLETIONS, b'{"model": "m", "prompt": "\xff\xfe\xc3("}'),
    "half a surrogate pair": (COMPLETIONS, rb'{"model": "m", "prompt": "\ud800", "max_tokens": 2}'),
    "broken JSON": (COMPLETIONS, b'{"model": "m", "prompt": '),
    "no body": (COMPLETIONS, b""),
    "JSON of another kind": (COMPLETIONS, b"[1, 2]"),
    "deep JSON": (COMPLETIONS, b'{"model": "m", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "broken regex": (COMPLETIONS, body({"regex": "([", "structured_outputs": {"regex": "(["}})),
    "broken schema": (CHATS, body({"response_format": schema({"type": "nothing"})}, CHAT)),
    "grammar that matches nothing": (CHATS, body({"response_format": schema(IMPOSSIBLE)}, CHAT)),
    "characters that no token spells": (COMPLETIONS, body({"regex": "(?!)", "structured_outputs": {"regex": "(?!)"}})),
    "no messages": (CHATS, body({"messages": []}, CHAT)),
    "unknown role": (CHATS, body({"messages": [{"role": "nobody", "content": "Hello"}]}, CHAT)),
    "content of another kind": (CHATS, said(7)),
    "picture": (CHATS, said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])),
    "tool of another kind": (CHATS, body({"tools": [{"type": "function", "function": {}}]}, CHAT)),
    "choice of no tool": (CHATS, body({"tool_choice": {"type": "function", "function": {"name": "x"}}}, CHAT)),
}


# SGLang's own front end: it takes these for their defaults, looks at no model name, and makes as many requests as ``n``
# says, until memory ends.
TAKEN = {
    "vllm": (),
    "sglang": (
        *("negative answers", "negative logprobs", "negative top_k", "empty stop", "stop id past the vocabulary"),
        "unknown model",
    ),
}[ENGINE]
NOT_SENT = {"vllm": set(), "sglang": {"absurd answers"}}[ENGINE]


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_SENT])
def test_answer_is_clean_and_others_are_served(server, checkpoint, case):
    path, content = CASES[case]
    other = Request(tokens(40, seed=len(case)), 6)
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        served = pool.submit(client.post, **server.request(other.prompt, other.max_tokens, 0))
        hostile = client.post(path, content=content, headers={"Content-Type": "application/json"})
        answers = [server.parse(served.result())]
        answers.append(server.parse(client.post(**server.request(other.prompt, 6, 0))))
    print(f"{case}: {hostile.status_code} {hostile.text[:300]}")
    for answer in answers:
        (expected,) = whole(checkpoint("tiny"))([Query((*other.prompt, *answer.token_ids), len(answer.token_ids))])
        assert error(other, answer, expected) <= TOLERANCE
    assert hostile.status_code == 200 if case in TAKEN else 400 <= hostile.status_code < 500
    assert hostile.text
