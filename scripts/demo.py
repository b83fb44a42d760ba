"""Serve the demo checkpoint with MTP, talk to it, say which classes served and how fast, and stop.

Usage: demo.py ENGINE MODEL PORT (scripts/demo prepares both)
"""

import json
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families

from qnext_plugin.engines import server
from qnext_plugin.engines.config import all_cores, mtp_flags
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.engines.who_serves import check_log, native_environment

START_TIMEOUT = 300
DRAFTS = 2
SERVING = {
    "vllm": {"Qwen3NextForCausalLM": "vllm_ext.model", "Qwen3NextMTP": "vllm_ext.mtp"},
    "sglang": {"Qwen3NextForCausalLM": "sglang_ext.model", "Qwen3NextForCausalLMMTP": "sglang_ext.mtp"},
}
FLAGS = {
    "vllm": (
        *("--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**30)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ),
    "sglang": ("--tool-call-parser", "qwen"),
}
QUESTIONS = ("What is qnext-plugin?", "How do I serve the model on vLLM?", "Does MTP change the answers?")
NOTES = """Notes:
The quiet river is narrow.
k47=amber-otter
The baker crosses the old bridge.
m08=plum-heron
The tall tower is bright.
q92=ivory-lynx
The child visits the small garden.
What is m08?"""
NEXT = """
Next:
  source .qnext/{engine}/activate
  qnext plan Qwen/Qwen3-Next-80B-A3B-Instruct    # does the model fit here, and with which flags?
  {serve}
README.md says more."""
SERVE = {"vllm": "vllm serve MODEL", "sglang": "python -m sglang.launch_server --model-path MODEL"}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]


def main(engine: str, model: str, port: str) -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("demo: stopped"))
    os.environ["no_proxy"] = "127.0.0.1"
    log = Path(model).with_name("demo.log")
    flags = ["--served-model-name", "demo", *FLAGS[engine], *mtp_flags(engine, DRAFTS)]
    command = shlex.join(["python", *server.command(engine, model, int(port), flags)])
    print(f"The command: {command}\nIts log: {log}\nstarting the server ", end="", flush=True)
    env = all_cores() | native_environment(False) | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    waiting, started = Waiting(), time.monotonic()
    try:
        with server.serving(
            engine, model, flags, log, env=env, port=int(port), timeout=START_TIMEOUT, waiting=waiting
        ) as running:
            print(f" {time.monotonic() - started:.0f} s\n\nStep 4 of 4: a conversation", flush=True)
            talk = converse(engine, running.url)
            report_serving_classes(engine, log)
            report_acceptance(talk.accepted if engine == "sglang" else accepted_by_vllm(running.url))
            print(
                f"speed: {talk.tokens} tokens in {talk.seconds:.2f} s, {talk.tokens / talk.seconds:.0f} tokens/s",
                flush=True,
            )
    except EngineFailed as error:
        fail(f"the server failed: {error.reason}", log)
    except OpenAIError as error:
        fail(f"the request failed: {error}", log)
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
    finally:
        print("server stopped", flush=True)
    print(NEXT.format(engine=engine, serve=SERVE[engine]), flush=True)


class Waiting:
    """Print a dot every five seconds while the server starts."""

    def __init__(self) -> None:
        self.shown = 0.0

    def __call__(self, seconds: float) -> None:
        if seconds >= self.shown + 5:
            self.shown = seconds
            print(".", end="", flush=True)


def converse(engine: str, url: str) -> "Conversation":
    """Show a conversation as it comes."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    talk = Conversation(client, {"return_spec_tokens_details": True} if engine == "sglang" else {})
    for question in (*QUESTIONS, NOTES):
        talk.ask(question)
    talk.ask("What is the weather in Kalholm?", TOOLS)
    print(flush=True)
    return talk


class Conversation:
    """Each question starts anew; only a tool's result follows what was said. ``accepted`` counts steps by how many of
    their drafts were, where the answers say so."""

    def __init__(self, client: OpenAI, extra: dict[str, object]) -> None:
        self.client, self.extra = client, extra
        self.tokens, self.seconds, self.accepted = 0, 0.0, Counter[int]()

    def ask(self, question: str, tools: list[dict[str, object]] | None = None) -> None:
        indented = question.replace("\n", "\n           ")
        print(f"\nuser:      {indented}", flush=True)
        messages = [{"role": "user", "content": question}]
        calls = self.answer(messages, tools)
        if not tools:
            return
        if not calls:
            sys.exit("demo: the model did not call the tool that it was offered")
        result = json.dumps({"temperature": 17, "sky": "cloudy"})
        print(f"tool:      {result}", flush=True)
        for call in calls:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        self.answer(messages, tools)

    def answer(
        self, messages: list[dict[str, object]], tools: list[dict[str, object]] | None
    ) -> list[dict[str, object]]:
        """Stream the assistant's turn, add it to ``messages``, return its tool calls."""
        print("assistant: ", end="", flush=True)
        started, text, parts = time.monotonic(), "", []
        for chunk in self.client.chat.completions.create(
            model="demo",
            messages=messages,
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self.extra,
            **({"tools": tools} if tools else {}),
        ):
            if chunk.usage:
                self.tokens += chunk.usage.completion_tokens
            details = ((chunk.model_extra or {}).get("sglext") or {}).get("spec_tokens_details") or {}
            self.accepted.update(dict(enumerate(details.get("spec_correct_drafts_histogram") or ())))
            for choice in chunk.choices:
                text += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
                parts += choice.delta.tool_calls or []
        self.seconds += time.monotonic() - started
        calls: dict[int, dict[str, str]] = {}
        for part in parts:
            call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += part.id or ""
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
        print(", ".join(f"calls {call['name']} with {call['arguments']}" for call in calls.values()), flush=True)
        if not text and not calls:
            sys.exit("demo: the server answered with nothing")
        shown = [
            {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
            for c in calls.values()
        ]
        messages.append({"role": "assistant", "content": text} | ({"tool_calls": shown} if shown else {}))
        return shown


def report_serving_classes(engine: str, log: Path) -> None:
    # Without this check a plugin that failed to load would pass: the engine then serves its native model.
    classes = check_log(engine, False, log)
    if classes != SERVING[engine]:
        raise EngineFailed(f"qnext-plugin serves {classes}, expected {SERVING[engine]}", log)
    for name, module in classes.items():
        print(f"qnext-plugin: {name} is served by {module}", flush=True)


def accepted_by_vllm(url: str) -> Counter[int]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    values = {(s.name, s.labels.get("position")): int(s.value) for family in families for s in family.samples}
    at_least = [values.get(("vllm:spec_decode_num_drafts_total", None), 0)]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    at_least += [values.get((name, str(position)), 0) for position in range(DRAFTS)] + [0]
    return Counter({n: at_least[n] - at_least[n + 1] for n in range(DRAFTS + 1)})


def report_acceptance(accepted: Counter[int]) -> None:
    steps = accepted.total()
    if not steps:
        sys.exit("demo: the server says that it drafted no tokens")
    at_least = [sum(accepted[n] for n in range(draft, DRAFTS + 1)) for draft in range(1, DRAFTS + 1)]
    drafts = ", ".join(f"draft {i}: {n}/{steps} accepted" for i, n in enumerate(at_least, 1))
    print(f"MTP: {drafts}; {1 + sum(at_least) / steps:.2f} tokens per step", flush=True)


def fail(message: str, log: Path) -> None:
    print(f"\ndemo: {message}; the end of {log}:")
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
