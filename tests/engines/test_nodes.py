"""Two nodes that share nothing but a network, by the engines' own launchers: a namespace stands for the second one.

It has a network of its own, joined to this one by a pair of virtual interfaces, and no shared memory with it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
import torch

from qnext_plugin.engines import process
from qnext_plugin.engines.config import mtp_flags
from qnext_plugin.engines.server import COMMANDS, is_healthy
from qnext_plugin.verify.comparison import Completion, Result, compare
from qnext_plugin.verify.scenarios import tokens
from qnext_plugin.verify.tolerances import SERVED_LOGPROB_FLOAT32
from tests.engines.conftest import whole
from tests.support.installed import ENGINE
from tests.support.serving import Server

pytestmark = [pytest.mark.engine, pytest.mark.exhaustive]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PROMPTS = tuple(tokens(length, seed=length) for length in (1, 7, 40, 130, 300))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[str, str, str]]:
    """Name of the other node's namespace, and of the interface at each end of the cable."""
    name = f"qnext{os.getpid() % 100_000}"
    here, there = f"{name}a", f"{name}b"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"network namespaces need root: {e}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("address", "add", f"{ADDRESSES[0]}/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "address", "add", f"{ADDRESSES[1]}/30", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, here, there
    finally:
        ip("netns", "delete", name)  # and the cable with it


def command(model: str, node: int, master_port: int, port: int) -> list[str]:
    if ENGINE == "vllm":
        words = [*COMMANDS[ENGINE], model, "--served-model-name", "m"]
        words += ["--max-model-len", "512", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "64"]
        words += ["--tensor-parallel-size", "2", *mtp_flags("vllm", 2)]
        words += ["--master-addr", ADDRESSES[0], "--master-port", str(master_port)]
        words += ["--headless"] if node else ["--host", "127.0.0.1", "--port", str(port)]
    else:
        words = [*COMMANDS[ENGINE], model, "--context-length", "512", "--tp-size", "2"]
        words += ["--max-total-tokens", "4096", "--max-running-requests", "8", "--max-mamba-cache-size", "40"]
        words += [*mtp_flags("sglang", 2), "--dist-init-addr", f"{ADDRESSES[0]}:{master_port}"]
        words += ["--host", "127.0.0.1", "--port", str(port)]
    return [*words, "--dtype", "float32", "--nnodes", "2", "--node-rank", str(node)]


def apart(name: str, words: list[str]) -> list[str]:
    """The arguments of a Python that runs ``python *words`` in the namespace, with shared memory of its own."""
    alone = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    enter = ["ip", "netns", "exec", name, "unshare", "--mount", "--ipc", "sh", "-c", alone, "sh"]
    return ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *enter, sys.executable, *words]


def test_two_nodes_answer_as_transformers(tmp_path, checkpoint, link):
    name, *interfaces = link
    model, ports = str(checkpoint("tiny")), (process.free_port(), process.free_port())
    logs = [tmp_path / f"node{node}" for node in range(2)]
    url = f"http://127.0.0.1:{ports[1]}"

    with ExitStack() as nodes:
        started = []
        for node, log in enumerate(logs):
            env = {"VLLM_HOST_IP": ADDRESSES[node], "SGLANG_HOST_IP": ADDRESSES[node]}
            env |= {"GLOO_SOCKET_IFNAME": interfaces[node], "SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
            words = command(model, node, *ports)
            started.append(nodes.enter_context(process.started(apart(name, words) if node else words, log, env)))
        process.wait_until(lambda: is_healthy(url), started[0], logs[0], timeout=400)
        server = Server(ENGINE, url, logs[0], started[0])
        completions = []
        for prompt in PROMPTS:
            request = server.request(prompt, max_tokens=24, temperature=0)
            answer = server.parse(httpx.post(url + request["url"], json=request["json"], timeout=120))
            ids, logprobs = torch.tensor(answer.token_ids)[:, None], torch.tensor(answer.logprobs)[:, None]
            completions.append(Completion(prompt, answer.token_ids, ids, logprobs))
        assert started[1].poll() is None
    for log, mine, other in zip(logs, ("TP0", "TP1"), ("TP1", "TP0"), strict=True):
        said = log.read_text()
        assert "Qwen3NextForCausalLM is served by" in said and f"served by {ENGINE}_ext.mtp" in said, process.tail(log)
        if ENGINE == "sglang":
            assert f" {mine}]" in said and f" {other}]" not in said
    assert ENGINE == "sglang" or "world_size=2, local_world_size=1" in logs[0].read_text()
    tolerance = SERVED_LOGPROB_FLOAT32[ENGINE]
    difference = compare(Result([completions], 0, 0), whole(checkpoint("tiny")), tolerance)
    print(f"{difference.max:.2g} at {difference.worst}")
    assert difference.max <= tolerance, f"{difference.max:.3g} at {difference.worst}"
    assert not difference.wrong_tokens
