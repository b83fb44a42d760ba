"""Our classes are registered for this architecture, the engine's own when told so, and nothing else is touched."""

import json
from importlib.metadata import version

import pytest
from packaging.version import Version

from qnext_plugin.engines import process
from tests.support.installed import with_platform

ARCHITECTURE = "Qwen3NextForCausalLM"
REGISTRY = """
import json, sys
from vllm.config.compilation import CompilationConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm import ModelRegistry
models = {name: [m.module_name, m.class_name] for name, m in ModelRegistry.models.items()}
hooks = {name: str(hook) for name, hook in MODELS_CONFIG_MAP.items()}
found = {"models": models, "hooks": hooks, "splitting_ops": CompilationConfig._attention_ops}
json.dump(found, open(sys.argv[1], "w"))
"""
ANOTHER_DRAFT = """
import sys
from vllm.engine.arg_utils import EngineArgs
draft = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, speculative_config=draft).create_engine_config()
"""
NGRAMS = """
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

def configure():
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    return EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, speculative_config=draft).create_engine_config()

config, before = configure(), torch.get_num_threads()
from vllm.v1.spec_decode.ngram_proposer import NgramProposer  # it imports Numba
NgramProposer(config)
configure()
current_platform.register_triton_kernel_overrides()
print("threads of torch:", before, torch.get_num_threads())
"""
BLOCK_SIZE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
size = config.cache_config.block_size = 3 * config.cache_config.block_size
config.__post_init__()
print("blocks are", "kept" if config.cache_config.block_size == size else "forgotten")
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory, libraries):
    directory = tmp_path_factory.mktemp("registry")

    def read(name, **env):
        out, log = directory / f"{name}.json", directory / f"{name}.log"
        with libraries.forking():
            assert process.run(["-c", REGISTRY, str(out)], log, env) == 0, process.tail(log)
        return json.loads(out.read_text())

    read.log = lambda name: (directory / f"{name}.log").read_text()
    return read


@pytest.fixture(scope="module")
def off(registry):
    return registry("off", QNEXT_DISABLE="1")


def test_only_this_architecture_and_its_draft_change(registry, off):
    ours = registry("ours")
    changed = {name for name in ours["models"] if ours["models"][name] != off["models"].get(name)}
    assert changed == {ARCHITECTURE, "Qwen3NextMTP"}
    assert all(ours["models"][name] == ["vllm_ext", name] for name in changed)
    assert ours["models"].keys() == off["models"].keys()
    assert ours["splitting_ops"] == off["splitting_ops"]
    assert "CheckedConfig" in ours["hooks"].pop(ARCHITECTURE)
    assert ours["hooks"] == off["hooks"]


OF_ITSELF = "kept" if Version(version("vllm")) >= Version("0.33") else "forgotten"


@pytest.mark.parametrize(("env", "said"), [({}, "kept"), ({"QNEXT_DISABLE": "1"}, OF_ITSELF)], ids=["ours", "off"])
def test_blocks_keep_their_size_when_a_process_sets_up_again(checkpoint, tmp_path, libraries, env, said):
    """As each engine process does, once it has enlarged them: see ``compat.KeepsBlockSize``."""
    log = tmp_path / "log"
    with libraries.forking():
        assert process.run(["-c", BLOCK_SIZE, str(checkpoint("tiny"))], log, env) == 0, process.tail(log)
    assert f"blocks are {said}\n" in log.read_text()


def test_native_class_when_told_so(registry, off):
    for served in (off, registry("another", VLLM_PLUGINS="another_plugin")):
        assert served["models"][ARCHITECTURE][0].startswith("vllm.")


def test_native_class_on_an_accelerator_that_ours_does_not_know(registry, tmp_path):
    platform = (
        "from vllm.platforms.cpu import CpuPlatform\n"
        "from vllm.platforms.interface import PlatformEnum\n"
        "class Other(CpuPlatform): _enum = PlatformEnum.OOT\n"
    )
    env = with_platform(tmp_path, "vllm.platform_plugins", platform)
    models = registry("other", **env)["models"]
    assert models[ARCHITECTURE][0].startswith("vllm.") and models["Qwen3NextMTP"][0].startswith("vllm.")
    assert registry.log("other").count("the platform is Other. vllm's own model serves") == 1


def test_another_draft_is_refused_before_a_process_starts(checkpoint, tmp_path, libraries):
    log = tmp_path / "log"
    with libraries.forking():
        assert process.run(["-c", ANOTHER_DRAFT, str(checkpoint("tiny"))], log) != 0
    assert "speculative method 'ngram_gpu' found, expected one of mtp, ngram" in log.read_text(), process.tail(log)


def test_numba_leaves_the_number_of_threads_and_the_next_engine_alone(checkpoint, tmp_path, libraries):
    log = tmp_path / "log"
    with libraries.forking():
        status = process.run(["-c", NGRAMS, str(checkpoint("tiny"))], log, {"OMP_NUM_THREADS": "1"})
    assert status == 0, process.tail(log)
    assert "threads of torch: 1 1\n" in log.read_text()
