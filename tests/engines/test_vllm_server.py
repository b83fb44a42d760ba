"""The commands of the model's card and blog, run as users run them and asked through the `openai` client.

Changed are the model, the number of GPUs, the port and the lengths. Where numbers are compared, the dtype is float32
and nothing is compiled, to save minutes.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines import process
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.scenarios import tokens
from tests.support.serving import EXACT, MTP, NAME, Server, serving
from tests.support.tolerances import LOGPROB_FLOAT32

TRAINED_LENGTH, SERVED_LENGTH = 256, 1000
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED_LENGTH}
CONFIG = {"max_position_embeddings": TRAINED_LENGTH, "rope_theta": 5_000_000}  # as Qwen3-Coder-Next has it
LONG = [*EXACT, "--enforce-eager", "--max-model-len", str(SERVED_LENGTH)]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
RECOMMENDED = {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.5, "extra_body": {"top_k": 20, "min_p": 0}}
LONGER = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    # The same weights: they depend on the tensor's name only.
    write_random_checkpoint(root / "bfloat16", overrides=CONFIG)
    write_random_checkpoint(root / "plain", dtype="float32", overrides=CONFIG)
    write_random_checkpoint(root / "yarn", dtype="float32", overrides=CONFIG | {"rope_scaling": YARN})
    return root


@pytest.fixture
def serve(tmp_path):
    @contextmanager
    def started(model: Path, *flags: str, **env: str) -> Iterator[Server]:
        with serving("vllm", model, flags, tmp_path / "log", env) as server:
            yield server
            server.client.close()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(60) == 0, process.tail(server.log)
            assert_gone(server.process.pid)

    return started


def who_serves(server: Server) -> set[tuple[str, str, str]]:
    """Each process's kind, the class and where it is from, as the start-up lines say."""
    line = r"\((\w+) pid=.*qnext-plugin \S+: (\w+)\S* (?:is served by|.*registered from) ([\w.]+)"
    return set(re.findall(line, server.log.read_text()))


def assert_gone(group: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the server has ended, processes that it started have not")


@pytest.mark.parametrize(
    "workers", [("Worker",), pytest.param(("Worker_TP0", "Worker_TP1"), marks=pytest.mark.exhaustive)], ids=len
)
def test_plain(written, serve, workers):
    """Compiled by Inductor, as by default; on two ranks its graph has their sums in it."""
    flags = ["--max-model-len", str(TRAINED_LENGTH), "--tensor-parallel-size", str(len(workers))]
    with serve(written / "bfloat16", *flags) as server:
        registered = {("EngineCore", "Qwen3NextForCausalLM", "vllm_ext")}
        assert who_serves(server) >= registered | {(w, "Qwen3NextForCausalLM", "vllm_ext.model") for w in workers}
        ask(server)


def test_mtp_past_the_trained_length(written, serve):
    flags = ["--tensor-parallel-size", "2", *MTP["vllm"], *TOOLS]
    with serve(written / "plain", *flags, *LONG, **LONGER) as server:
        classes = ("Qwen3NextForCausalLM", "vllm_ext.model"), ("Qwen3NextMTP", "vllm_ext.mtp")
        assert who_serves(server) >= {(f"Worker_TP{i}", *served) for i in (0, 1) for served in classes}
        ask(server)
        call_tools(server)
        assert_rope(server, written, "plain", wrong="yarn")


@pytest.mark.parametrize("where", ["override", pytest.param("config", marks=pytest.mark.exhaustive)])
def test_yarn(written, serve, where):
    flags = ["--hf-overrides", json.dumps({"rope_scaling": YARN})] if where == "override" else []
    with serve(written / ("plain" if where == "override" else "yarn"), *flags, *LONG, **LONGER) as server:
        assert ("Worker", "Qwen3NextForCausalLM", "vllm_ext.model") in who_serves(server)
        assert_rope(server, written, "yarn", wrong="plain")


def ask(server: Server) -> None:
    """A chat completion, whole and streamed, and one sampled as recommended."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    greedy = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    whole = server.chat(messages, **greedy)
    assert whole.choices[0].message.content
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (24, "length")
    chunks = list(server.chat(messages, **greedy, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 4
    assert chunks[-1].usage.completion_tokens == 24

    sampled = server.chat(messages, max_tokens=24, n=2, **RECOMMENDED)
    assert len(sampled.choices) == 2
    assert sampled.choices[0].message.content != sampled.choices[1].message.content


def call_tools(server: Server) -> None:
    """Tools are offered, and a call's result is handed in; random weights never call one themselves."""
    tools = [{"type": "function", "function": WEATHER}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "The weather in Paris?"}]
    without = server.chat(messages, max_tokens=4)
    offered = server.chat(messages, tools=tools, tool_choice="auto", max_tokens=4)
    assert offered.usage.prompt_tokens > without.usage.prompt_tokens + len(WEATHER["description"])
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    messages.append({"role": "assistant", "tool_calls": [{"id": "call-1", "type": "function", "function": call}]})
    messages.append({"role": "tool", "tool_call_id": "call-1", "content": "Rain, 12 degrees."})
    answered = server.chat(messages, tools=tools, tool_choice="auto", max_tokens=4)
    assert answered.usage.prompt_tokens > offered.usage.prompt_tokens + len("Rain, 12 degrees.")


def assert_rope(server: Server, written: Path, right: str, wrong: str) -> None:
    """Each token's log-probability, prompt and completion, past the trained length, is that of `transformers`."""
    prompt = tokens(SERVED_LENGTH - 100, seed=3)
    answer = server.client.completions.create(
        model=NAME,
        prompt=list(prompt),
        max_tokens=20,
        temperature=0,
        logprobs=0,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True, "ignore_eos": True},
    ).choices[0]
    assert len(answer.token_ids) == 20
    served = [row[str(token)]["logprob"] for token, row in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
    served += answer.logprobs.token_logprobs
    ids = (*prompt, *answer.token_ids)

    def error(checkpoint: str) -> float:
        (rows,) = Whole(written / checkpoint)([Query(ids, len(ids) - 1)])
        expected = rows.gather(torch.tensor(ids)[1:, None])[:, 0]
        return float((torch.tensor(served) - expected).abs().max())

    print(f"{right}: {error(right):.2g}; {wrong}: {error(wrong):.2g}")
    assert error(right) <= LOGPROB_FLOAT32
    assert error(wrong) > 100 * LOGPROB_FLOAT32
