"""Tool calls in the XML dialect of Qwen3-Coder-Next, by the parser that its card names, with drafts.

The model writes what a grammar leaves open. Where the engine adds no grammar, a regular expression writes the call.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.support.demo import Messages
from tests.support.installed import ENGINE
from tests.support.serving import NAME, Server

pytestmark = pytest.mark.parametrize("server", ["coder"], indirect=True)

QUESTION: Messages = [{"role": "user", "content": "What is the weather in Kalholm?"}]


def whole(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has all of these properties and no other."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


ARGUMENTS: dict[str, Any] = {
    "count": 7,
    "ratio": -1.25,
    "unit": "day",
    "yes": True,
    "days": [2, 2],
    "place": {"at": {"x": 3}},
    "no": {},
}
# A grammar of these leaves one answer, whatever the model prefers.
SCHEMAS = {
    "get_weather": whole(
        count={"type": "integer", "minimum": 7, "maximum": 7},
        ratio={"type": "number", "enum": [-1.25]},
        unit={"type": "string", "enum": ["day"]},
        yes={"type": "boolean", "enum": [True]},
        days={"type": "array", "items": {"type": "integer", "enum": [2]}, "minItems": 2, "maxItems": 2},
        place=whole(at=whole(x={"type": "integer", "enum": [3]})),
        no=whole(),
    ),
    "update": whole(),
}
NOTE = whole(text={"type": "string"})
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", ARGUMENTS),
    ("note", {"text": '  1 < 2 && "b"\n\n  <b>Zürich</b> {}'}),
    ("update", {}),
]


def written(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as the model writes it."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


# Each of the next three asks by one API, and returns the text of the answer, and its calls as names and JSON.
Answer = tuple[str, list[list[str]]]


def chat(server: Server, choice: str, strict: bool, stream: bool, **options: Any) -> Answer:
    named = {"type": "function", "function": {"name": "get_weather"}}
    request = {"messages": QUESTION, "tools": chat_tools(strict), "temperature": 0, "max_tokens": 400} | options
    answer = server.chat(tool_choice=named if choice == "named" else choice, stream=stream, **request)
    if not stream:
        message = answer.choices[0].message
        return message.content or "", [[c.function.name, c.function.arguments] for c in message.tool_calls or []]
    text, calls = "", []
    for delta in (choice.delta for chunk in answer for choice in chunk.choices):
        text += delta.content or ""
        for call in delta.tool_calls or []:
            if call.index == len(calls):
                calls.append(["", ""])
            calls[call.index][0] += call.function.name or ""
            calls[call.index][1] += call.function.arguments or ""
    return text, calls


def chat_tools(strict: bool, **more: Any) -> list[dict[str, Any]]:
    schemas = SCHEMAS | more
    functions = [{"name": name, "parameters": schema, "strict": strict} for name, schema in schemas.items()]
    return [{"type": "function", "function": function} for function in functions]


def responses(server: Server, choice: str, strict: bool, stream: bool, max_tokens: int = 400) -> Answer:
    named = {"type": "function", "name": "get_weather"}
    tools = [{"type": "function", "name": name, "parameters": s, "strict": strict} for name, s in SCHEMAS.items()]
    body = {"input": QUESTION, "tools": tools, "tool_choice": named if choice == "named" else choice}
    received = post(server, "/v1/responses", stream, body | {"max_output_tokens": max_tokens})
    if not stream:
        (answer,) = received
        parts = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
        calls = [[i["name"], i["arguments"]] for i in answer["output"] if i["type"] == "function_call"]
        return "".join(part["text"] for part in parts), calls
    text, calls = "", []
    for event in received:
        if event["type"] == "response.output_text.delta":
            text += event["delta"]
        elif event["type"] == "response.output_item.added" and event["item"]["type"] == "function_call":
            calls.append([event["item"]["name"], ""])
        elif event["type"] == "response.function_call_arguments.delta":
            calls[-1][1] += event["delta"]
    return text, calls


def messages(server: Server, choice: str, strict: bool, stream: bool, max_tokens: int = 400) -> Answer:
    choices = {"auto": {"type": "auto"}, "required": {"type": "any"}, "named": {"type": "tool", "name": "get_weather"}}
    tools = [{"name": name, "input_schema": schema, "strict": strict} for name, schema in SCHEMAS.items()]
    body = {"messages": QUESTION, "tools": tools, "tool_choice": choices[choice], "max_tokens": max_tokens}
    received = post(server, "/v1/messages", stream, body)
    if not stream:
        (answer,) = received
        calls = [[b["name"], json.dumps(b["input"])] for b in answer["content"] if b["type"] == "tool_use"]
        return "".join(b["text"] for b in answer["content"] if b["type"] == "text"), calls
    text, calls = "", []
    for event in received:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append([event["content_block"]["name"], ""])
        elif event["type"] == "content_block_delta":
            text += event["delta"].get("text", "")
            if "partial_json" in event["delta"]:
                calls[-1][1] += event["delta"]["partial_json"]
    return text, calls


def post(server: Server, path: str, stream: bool, body: dict[str, Any]) -> Iterator[Any]:
    """Yield the answer, or the events of its stream."""
    body = body | {"model": NAME, "temperature": 0, "stream": stream}
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=180) as response:
        assert response.status_code == 200, response.read()
        if stream:
            yield from (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        else:
            yield json.loads(response.read())


APIS: dict[str, Callable[..., Answer]] = {"chat": chat, "responses": responses, "messages": messages}
BY_NAME = [pytest.param(api, "named", marks=[] if api == "chat" else pytest.mark.exhaustive) for api in APIS]


def parsed(answer: Answer) -> tuple[str, list[tuple[str, Any]]]:
    """Return an answer without the white space around its calls, which the engines keep when they stream."""
    text, calls = answer
    return text.strip(), [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(
    ("api", "choice"), [(api, choice) for choice in ("auto", "required") for api in APIS] + BY_NAME
)
def test_strict_arguments_are_of_the_schema_and_the_stream_adds_up(server, api, choice):
    answer, streamed = (parsed(APIS[api](server, choice, True, stream)) for stream in (False, True))
    print(answer)
    assert streamed == answer
    text, calls = answer
    if choice != "auto":  # what the model calls by itself is in another dialect
        assert text == "" and len(calls) == 1
    assert all(call in CALLS for call in calls)
    assert choice != "named" or calls[0][0] == "get_weather"


@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize("api", APIS)
def test_the_function_is_right_without_strict(server, api, choice):
    """Its arguments are free, and what the model makes of that does not end."""
    for stream in (False, True):
        _, ((name, _), *_) = APIS[api](server, choice, False, stream, max_tokens=32)
        assert name in (SCHEMAS if choice == "required" else ["get_weather"])


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_from_the_text(server, stream):
    said = "\n".join(["I look it up.", *(written(name, arguments) for name, arguments in CALLS)])
    regex = re.sub(r"([\\.^$*+?(){}|\[\]])", r"\\\1", said).replace("\n", r"\n")
    extra = {"vllm": {"structured_outputs": {"regex": regex}}, "sglang": {"regex": regex}}[ENGINE]
    answer = chat(server, "auto", False, stream, tools=chat_tools(False, note=NOTE), extra_body=extra, max_tokens=600)
    assert parsed(answer) == ("I look it up.", CALLS)


def test_calls_and_results_of_the_history_are_written_in_the_dialect(server, checkpoint):
    def history(form: Callable[[Any], Any]) -> Messages:
        functions = [{"name": name, "arguments": form(arguments)} for name, arguments in CALLS]
        calls = [{"id": str(i), "type": "function", "function": function} for i, function in enumerate(functions)]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "cloudy"} for call in calls]
        return [*QUESTION, {"role": "assistant", "content": "Wait.", "tool_calls": calls}, *results, *QUESTION]

    tokenizer, tools = AutoTokenizer.from_pretrained(checkpoint("coder")), chat_tools(False, note=NOTE)
    prompt = tokenizer.apply_chat_template(history(dict), tools=tools, add_generation_prompt=True, tokenize=False)
    assert all(written(name, arguments) in prompt for name, arguments in CALLS)
    answer = server.chat(history(json.dumps), tools=tools, temperature=0, max_tokens=4)
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
