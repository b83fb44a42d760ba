"""Two nodes that share nothing but a network, by the engines' own launchers: a namespace stands for the second one.

It has a network of its own, joined to this one by a pair of virtual interfaces, and no shared memory with it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import torch

from qnext_plugin.engines import process
from qnext_plugin.engines.server import COMMANDS
from qnext_plugin.verify.comparison import Completion, Result, compare
from qnext_plugin.verify.scenarios import tokens
from tests.support.installed import ENGINE
from tests.support.references import TOLERANCE, whole
from tests.support.serving import EXACT, MTP, NAME, serving

pytestmark = pytest.mark.exhaustive

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PROMPTS = tuple(tokens(length, seed=length) for length in (1, 7, 40, 130, 300))
FLAGS = {
    "vllm": (
        *("--max-model-len", "512", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "64"),
        *("--tensor-parallel-size", "2", "--master-addr", ADDRESSES[0], "--master-port", "{port}"),
    ),
    "sglang": (
        *("--context-length", "512", "--tp-size", "2", "--max-total-tokens", "4096", "--max-running-requests", "8"),
        *("--max-mamba-cache-size", "40", "--dist-init-addr", f"{ADDRESSES[0]}:{{port}}"),
    ),
}[ENGINE]
OTHER_NODE = {"vllm": ("--headless",), "sglang": ()}[ENGINE]
# What each node's log says of the ranks there.
LOGGED = {"vllm": (["world_size=2, local_world_size=1"], []), "sglang": ([" TP0]"], [" TP1]"])}[ENGINE]
NOT_LOGGED = {"vllm": ([], []), "sglang": ([" TP1]"], [" TP0]"])}[ENGINE]


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


def flags(node: int, master_port: int) -> list[str]:
    common = [flag.format(port=master_port) for flag in FLAGS]
    return [*common, *MTP[ENGINE], *EXACT, "--nnodes", "2", "--node-rank", str(node)]


def apart(name: str, words: list[str]) -> list[str]:
    """The arguments of a Python that runs ``python *words`` in the namespace, with shared memory of its own."""
    alone = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    enter = ["ip", "netns", "exec", name, "unshare", "--mount", "--ipc", "sh", "-c", alone, "sh"]
    return ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])", *enter, sys.executable, *words]


def test_two_nodes_answer_as_transformers(tmp_path, checkpoint, link):
    name, *interfaces = link
    model, port = checkpoint("tiny"), process.free_port()
    logs = [tmp_path / f"node{node}" for node in range(2)]
    envs = [
        {"VLLM_HOST_IP": address, "SGLANG_HOST_IP": address, "GLOO_SOCKET_IFNAME": interface}
        | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
        for address, interface in zip(ADDRESSES, interfaces, strict=True)
    ]
    words = [*COMMANDS[ENGINE], str(model), "--served-model-name", NAME, *flags(1, port), *OTHER_NODE]
    with (
        process.started(apart(name, words), logs[1], envs[1]) as other_node,
        serving(ENGINE, model, flags(0, port), logs[0], envs[0]) as server,
    ):
        completions = []
        for prompt in PROMPTS:
            request = server.request(prompt, max_tokens=24, temperature=0)
            answer = server.parse(httpx.post(server.url + request["url"], json=request["json"], timeout=120))
            ids, logprobs = torch.tensor(answer.token_ids)[:, None], torch.tensor(answer.logprobs)[:, None]
            completions.append(Completion(prompt, answer.token_ids, ids, logprobs))
        assert other_node.poll() is None
    for log, logged, not_logged in zip(logs, LOGGED, NOT_LOGGED, strict=True):
        text = log.read_text()
        assert "Qwen3NextForCausalLM is served by" in text and f"served by {ENGINE}_ext.mtp" in text, process.tail(log)
        assert all(words in text for words in logged) and not any(words in text for words in not_logged)
    difference = compare(Result([completions], 0, 0), whole(checkpoint("tiny")), TOLERANCE)
    print(f"{difference.max:.2g} at {difference.worst}")
    assert difference.max <= TOLERANCE, f"{difference.max:.3g} at {difference.worst}"
    assert not difference.wrong_tokens
