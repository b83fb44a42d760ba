"""Serve the demo checkpoint with MTP, talk to it, say which classes served and how fast, and stop.

Usage: demo.py ENGINE MODEL PORT (scripts/demo prepares both)
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT = 300
DRAFTS = 2
SERVING = {
    "vllm": (("Qwen3NextForCausalLM", "vllm_ext.model"), ("Qwen3NextMTP", "vllm_ext.mtp")),
    "sglang": (("Qwen3NextForCausalLM", "sglang_ext.model"), ("Qwen3NextForCausalLMMTP", "sglang_ext.mtp")),
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
    command = serve_command(engine, model, port)
    print(f"starting: {' '.join(command)}\nits log: {log}", flush=True)
    server = start(command, log)
    try:
        wait_until_healthy(server, port, log)
        talk = converse(engine, port)
        report_serving_classes(engine, log)
        report_acceptance(talk.accepted if engine == "sglang" else accepted_by_vllm(port))
        print(
            f"speed: {talk.tokens} tokens in {talk.seconds:.2f} s, {talk.tokens / talk.seconds:.0f} tokens/s",
            flush=True,
        )
    except OpenAIError as error:
        fail(f"the request failed: {error}", log)
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
    finally:
        stop(server)
        print("server stopped", flush=True)


def serve_command(engine: str, model: str, port: str) -> list[str]:
    flags = ["--host", "127.0.0.1", "--port", port, "--served-model-name", "demo"]
    if engine == "sglang":
        drafts = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(DRAFTS)]
        drafts += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(DRAFTS + 1)]
        tools = ["--tool-call-parser", "qwen"]
        return [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *flags, *tools, *drafts]
    small = ["--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**30)]
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    drafts = json.dumps({"method": "qwen3_next_mtp", "num_speculative_tokens": DRAFTS})
    return ["vllm", "serve", model, *flags, *small, *tools, "--speculative-config", drafts]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    # vLLM's CPU worker leaves a core idle by default.
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**defaults, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_healthy(server: subprocess.Popen[bytes], port: str, log: Path) -> None:
    started, shown = time.monotonic(), 0.0
    while not healthy(port):
        elapsed = time.monotonic() - started
        if server.poll() is not None:
            fail(f"the server exited with status {server.returncode} after {elapsed:.0f} s", log)
        if elapsed > START_TIMEOUT:
            fail(f"the server is not healthy after {START_TIMEOUT} s", log)
        if elapsed >= shown + 5:
            shown = elapsed
            print(f"waiting for the server: {elapsed:.0f} s", flush=True)
        time.sleep(0.5)
    print(f"the server is up after {time.monotonic() - started:.0f} s", flush=True)
    if server.poll() is not None:
        fail(f"another server answers on port {port}; ours exited with status {server.returncode}", log)


def healthy(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def converse(engine: str, port: str) -> "Conversation":
    """Show a conversation as it comes."""
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
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
    lines = re.findall(r".*(?:qnext-plugin[ :]|load plugin).*", log.read_text(errors="replace"))
    for name, module in SERVING[engine]:
        served = [line for line in lines if f"{name} is served by {module}" in line]
        if not served:
            print(*lines, sep="\n")
            sys.exit(f"demo: no line of the server's log says that qnext-plugin serves {name}: the engine's did")
        print(served[0], flush=True)


def accepted_by_vllm(port: str) -> Counter[int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
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
    print(f"demo: {message}; the end of {log}:")
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    sys.exit(1)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process it started: politely, then not."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    for signum, patience in ((signal.SIGINT, 15), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            if signum == signal.SIGINT and server.poll() is None:
                server.send_signal(signum)
            else:
                os.killpg(server.pid, signum)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            server.poll()
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
