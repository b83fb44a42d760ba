"""Our classes serve this architecture in every process, the engine's own when told so, and nothing else is touched."""

import json
import re
import urllib.request

import pytest

from tests.engines import process

pytestmark = pytest.mark.engine

ARCHITECTURE = "Qwen3NextForCausalLM"
REGISTRY = """
import json, sys
from vllm.config.compilation import CompilationConfig
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm import ModelRegistry
models = {name: [m.module_name, m.class_name] for name, m in ModelRegistry.models.items()}
json.dump({"models": models, "splitting_ops": CompilationConfig._attention_ops}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    directory = tmp_path_factory.mktemp("registry")

    def read(name, **env):
        out, log = directory / f"{name}.json", directory / f"{name}.log"
        assert process.run(["-c", REGISTRY, str(out)], log, env) == 0, process.tail(log)
        return json.loads(out.read_text())

    return read


def test_only_this_architecture_and_its_draft_change(registry):
    ours, off = registry("ours"), registry("off", QNEXT_DISABLE="1")
    changed = {name for name in ours["models"] if ours["models"][name] != off["models"].get(name)}
    assert changed == {ARCHITECTURE, "Qwen3NextMTP"}
    assert all(ours["models"][name] == ["vllm_ext", name] for name in changed)
    assert ours["models"].keys() == off["models"].keys()
    assert ours["splitting_ops"] == off["splitting_ops"]


@pytest.mark.parametrize("env", [{"QNEXT_DISABLE": "1"}, {"VLLM_PLUGINS": "another_plugin"}], ids=["off", "another"])
def test_native_class_when_told_so(registry, env):
    assert registry("native", **env)["models"][ARCHITECTURE][0].startswith("vllm.")


def test_server_and_its_engine_process_use_our_class(checkpoint, tmp_path):
    port, log = process.free_port(), tmp_path / "serve.log"
    model = str(checkpoint("tiny"))
    command = ["-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "qnext", "--port", str(port)]
    options = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    url = f"http://127.0.0.1:{port}"

    def ready():
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    with process.started([*command, *options], log) as server:
        process.wait_until(ready, server, log)
        body = {"model": "qnext", "prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
    text = log.read_text()
    for name in ("APIServer", "EngineCore|Worker"):
        assert re.search(rf"\((?:{name}).*qnext-plugin .*{ARCHITECTURE}.* vllm_ext", text), (
            f"{name}\n{process.tail(log)}"
        )
    assert server.poll() is not None
