"""What users see, on the trained demo checkpoint: answers, recall, tool calls, thinking and accepted drafts.

One server, started as users start it (bfloat16, prefix caching, MTP where there is one) and asked over HTTP by
eight clients at a time, so that prefills come in chunks, mixed with decoding. Float32 `transformers` answers the same
prompts.
"""

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qnext_plugin.verify.rows import Query, Reference
from tests.support import demo
from tests.support.demo import Messages, Prompt
from tests.support.installed import ENGINE
from tests.support.references import whole
from tests.support.serving import NAME, Server

pytestmark = pytest.mark.parametrize("server", ["demo"], indirect=True)

DRAFT_CLASS = {"vllm": "Qwen3NextMTP", "sglang": "Qwen3NextForCausalLMMTP"}
INSTRUCT, THINKING = ({"chat_template_kwargs": {"enable_thinking": on}} for on in (False, True))


def chat(server: Server, messages: Messages, extra: dict[str, Any] = INSTRUCT, **options: Any) -> Any:
    return server.chat(messages, temperature=0, max_tokens=64, extra_body=extra, **options)


def counter(server: Server, name: str) -> dict[str, float]:
    """Samples of a counter by their ``position`` label."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    return {s.labels.get("position", ""): s.value for f in families for s in f.samples if s.name == name}


def together(ask: Callable[[Any], Any], prompts: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(8) as clients:
        return list(clients.map(ask, prompts))


def share_right(server: Server, prompts: list[Prompt], label: str, exact: Reference) -> float:
    """The share of prompts with the right answer, within a point of what `transformers` gets right."""
    answers = together(lambda prompt: chat(server, prompt.messages).choices[0].message.content, prompts)
    wrong = [(p.messages[-1]["content"][-40:], a) for p, a in zip(prompts, answers, strict=True) if a != p.answer]
    share = 1 - len(wrong) / len(prompts)
    theirs = sum(would_say(exact, prompt) for prompt in prompts) / len(prompts)
    print(f"{label}: {share:.1%} of {len(prompts)} right, transformers {theirs:.1%}; {wrong[:3]}")
    assert share >= theirs - 0.01, wrong
    return share


def would_say(exact: Reference, prompt: Prompt) -> bool:
    """Whether greedy `transformers` gives the answer: each of its tokens is the likeliest one after those before."""
    (rows,) = exact([Query(prompt.ids + prompt.answer_ids, len(prompt.answer_ids))])
    return tuple(rows.likeliest.tolist()) == prompt.answer_ids


@pytest.fixture(scope="module")
def exact(checkpoint) -> Reference:
    return whole(checkpoint("demo"))


def test_our_classes_serve(server):
    for name, module in (("Qwen3NextForCausalLM", "model"), (DRAFT_CLASS[ENGINE], "mtp")):
        assert re.search(rf"qnext-plugin \S+: {name} is served by {ENGINE}_ext\.{module}\b", server.log.read_text())


def test_closed_questions(server, exact):
    assert share_right(server, demo.questions(), "closed questions", exact) >= 0.95


def accepted_by_counters(server: Server, prompts: list[Prompt]) -> list[int]:
    """Steps in which at least 0, 1 and 2 drafts were accepted while these were answered."""
    names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens_per_pos")]
    before = [counter(server, name) for name in names]
    together(lambda prompt: chat(server, prompt.messages), prompts)
    steps, drafts = (
        {p: n - old.get(p, 0) for p, n in counter(server, m).items()} for m, old in zip(names, before, strict=True)
    )
    return [int(n) for n in (steps[""], drafts["0"], drafts["1"])]


def accepted_by_answers(server: Server, prompts: list[Prompt]) -> list[int]:
    """The same, of an engine that says so with each answer."""
    extra = INSTRUCT | {"return_spec_tokens_details": True}
    answers = together(lambda prompt: chat(server, prompt.messages, extra), prompts)
    steps = [answer.sglext["spec_tokens_details"]["spec_correct_drafts_histogram"] for answer in answers]
    return [sum(sum(histogram[n:]) for histogram in steps) for n in range(3)]


ACCEPTED = {"vllm": accepted_by_counters, "sglang": accepted_by_answers}[ENGINE]


def test_accepted_drafts(server):
    at_least = ACCEPTED(server, demo.questions())
    rates = [n / at_least[0] for n in at_least[1:]]
    print(f"accepted: {rates[0]:.1%} and {rates[1]:.1%} of {at_least[0]} steps, {1 + sum(rates):.2f} tokens per step")
    assert rates[0] >= 0.85 and rates[1] >= 0.65 and 1 + sum(rates) >= 2.3


@pytest.mark.parametrize(("length", "at_least"), [(256, 0.98), (1024, 0.95)])
def test_recall(server, exact, length, at_least):
    first, second = zip(*demo.recall(length, 32), strict=True)
    assert share_right(server, list(first), f"recall at {length}", exact) >= at_least
    assert share_right(server, list(second), f"recall at {length}, a turn later", exact) >= at_least


@pytest.mark.only("sglang")
@pytest.mark.parametrize("length", [256, 1024])
def test_recall_on_prefix_hits(server, exact, length):
    """On vLLM a block of bfloat16 is longer than half of these prompts; see ``test_demo_offline``."""
    for first, prompt in demo.recall(length, 4):
        *_, again = (chat(server, turn.messages) for turn in (first, prompt, prompt))
        assert again.choices[0].message.content == prompt.answer or not would_say(exact, prompt)
        assert again.usage.prompt_tokens_details.cached_tokens >= length / 2


def test_tool_calls(server):
    def ask(prompt: Prompt) -> Any:
        choice = chat(server, prompt.messages, tools=prompt.options["tools"], tool_choice="auto").choices[0]
        return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []], choice

    prompts = demo.tool_calls()
    wrong = []
    for prompt, (calls, choice) in zip(prompts, together(ask, prompts), strict=True):
        if [(name, json.loads(arguments)) for name, arguments in calls] != [("get_weather", {"city": prompt.answer})]:
            wrong.append((prompt.answer, choice.message))
        elif choice.finish_reason != "tool_calls" or choice.message.content:
            wrong.append((prompt.answer, choice))
    print(f"tool calls: {1 - len(wrong) / len(prompts):.1%} of {len(prompts)} right; {wrong[:3]}")
    assert len(wrong) <= 0.05 * len(prompts), wrong


@pytest.mark.parametrize("stream", [False, True])
def test_tool_turn(server, stream):
    """The call, its result handed in, the final answer."""
    messages: Messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the weather in Kalholm?"},
    ]
    name, arguments = call_streamed(server, messages) if stream else call_whole(server, messages)
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Kalholm"})
    call = {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}
    result = json.dumps({"temperature": 17, "sky": "cloudy"})
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": result},
    ]
    answer = chat(server, messages, tools=[demo.WEATHER], tool_choice="auto").choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is 17 degrees and cloudy in Kalholm.", "stop")
    assert not answer.message.tool_calls


def call_whole(server: Server, messages: Messages) -> tuple[str, str]:
    (call,) = chat(server, messages, tools=[demo.WEATHER], tool_choice="auto").choices[0].message.tool_calls
    return call.function.name, call.function.arguments


def call_streamed(server: Server, messages: Messages) -> tuple[str, str]:
    chunks = chat(server, messages, tools=[demo.WEATHER], tool_choice="auto", stream=True)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    functions = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert not "".join(delta.content or "" for delta in deltas).strip()
    return "".join(f.name or "" for f in functions), "".join(f.arguments or "" for f in functions)


def test_tool_turn_through_qwen_agent(server):
    """Qwen-Agent writes the tools into the prompt in words of its own and reads the call from the text."""
    from qwen_agent.agents import Assistant
    from qwen_agent.tools.base import BaseTool

    asked = []

    class Weather(BaseTool):
        name, description = (demo.WEATHER["function"][key] for key in ("name", "description"))
        parameters = demo.WEATHER["function"]["parameters"]

        def call(self, params: str, **_: Any) -> str:
            asked.append(json.loads(params))
            return json.dumps({"temperature": -4, "sky": "snowy"})

    generation = {"temperature": 0, "extra_body": INSTRUCT}
    llm = {"model_type": "oai", "model": NAME, "model_server": f"{server.url}/v1", "api_key": "none"}
    agent = Assistant(llm=llm | {"generate_cfg": generation}, function_list=[Weather()])
    *_, said = agent.run([{"role": "user", "content": "What is the weather in Norham?"}])
    assert asked == [{"city": "Norham"}]
    assert [message["role"] for message in said] == ["assistant", "function", "assistant"]
    assert said[-1]["content"] == "It is -4 degrees and snowy in Norham."


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_apart_from_the_answer(server, stream):
    def ask(prompt: Prompt) -> tuple[str, str]:
        if not stream:
            message = chat(server, prompt.messages, THINKING).choices[0].message
            return reasoning(message), message.content
        chunks = chat(server, prompt.messages, THINKING, stream=True)
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        return "".join(map(reasoning, deltas)), "".join(delta.content or "" for delta in deltas)

    prompts = demo.questions()[::4]
    right = 0
    for prompt, (thought, answer) in zip(prompts, together(ask, prompts), strict=True):
        assert "think>" not in thought + answer and "<|" not in thought + answer
        right += (thought.strip(), answer.strip()) == (demo.THOUGHT, prompt.answer)
    assert right >= 0.95 * len(prompts), right


def reasoning(message: Any) -> str:
    return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""


def test_instruct_does_not_think(server):
    for prompt in demo.questions()[:8]:
        message = chat(server, prompt.messages).choices[0].message
        assert (reasoning(message), message.content) == ("", prompt.answer)


def test_base_completes_raw_text(server):
    for prompt in demo.questions()[:8]:
        text = f"Question: {prompt.messages[0]['content']}\nAnswer:"
        answer = server.client.completions.create(
            model=NAME, prompt=text, temperature=0, max_tokens=64, stop=["\n"]
        ).choices[0]
        assert answer.text == f" {prompt.answer}"
