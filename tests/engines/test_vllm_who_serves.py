"""Our classes are registered for this architecture, the engine's own when told so, and nothing else is touched."""

import json

import pytest

from qnext_plugin import process

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
