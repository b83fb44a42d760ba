"""Our classes serve this architecture, the engine's own when told so, and nothing else is touched."""

import json
import os

import pytest

from qnext_plugin.engines import process

ARCHITECTURE = "Qwen3NextForCausalLM"
REGISTRY = """
import json, sys
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils.hf_transformers import common
load_plugins()
imported = [name for name in ("sglang.srt.models.registry", "sglang_ext.model") if name in sys.modules]
from sglang.srt.models.registry import ModelRegistry
ModelRegistry.resolve_model_cls([sys.argv[2]])
ModelRegistry._load_default_models()
json.dump({
    "models": {name: cls.__module__ for name, cls in ModelRegistry.models.items()},
    "configs": {name: cls.__module__ for name, cls in common._CONFIG_REGISTRY.items()},
    "platform": type(current_platform).__module__,
    "hooks": sorted(target for target in HookRegistry._patched if "sglang" in target),
    "imported": imported,
}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    directory = tmp_path_factory.mktemp("registry")

    def read(name, **env):
        out, log = directory / f"{name}.json", directory / f"{name}.log"
        assert process.run(["-c", REGISTRY, str(out), ARCHITECTURE], log, env) == 0, process.tail(log)
        return json.loads(out.read_text())

    return read


@pytest.fixture(scope="module")
def ours(registry):
    return registry("ours")


@pytest.fixture(scope="module")
def off(registry):
    return registry("off", QNEXT_DISABLE="1")


@pytest.mark.parametrize(
    ("kind", "keys"), [("models", {ARCHITECTURE, f"{ARCHITECTURE}MTP"}), ("configs", {"qwen3_next"})]
)
def test_only_this_architecture_changes(ours, off, kind, keys):
    changed = {name for name in ours[kind] if ours[kind][name] != off[kind].get(name)}
    assert changed == keys
    assert all(ours[kind][key].startswith("sglang_ext.") for key in keys)
    assert ours[kind].keys() == off[kind].keys()


def test_registration_alone_hooks_nothing_and_imports_no_model(ours, off):
    assert ours["hooks"] == off["hooks"]
    assert ours["imported"] == []


def test_platform_is_ours_without_an_accelerator_only(ours, off):
    assert ours["platform"] == "sglang_ext.cpu.platform"
    assert off["platform"].startswith("sglang.")


@pytest.mark.parametrize("env", [{"QNEXT_DISABLE": "1"}, {"SGLANG_PLUGINS": "another_plugin"}], ids=["off", "another"])
def test_native_class_when_told_so(registry, env):
    assert registry("native", **env)["models"][ARCHITECTURE] == "sglang.srt.models.qwen3_next"


def test_external_models_of_the_user_stay(registry, tmp_path):
    package = tmp_path / "their_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("class TheirModel: ...\nEntryClass = TheirModel\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])  # ours may be installed there
    models = registry("external", SGLANG_EXTERNAL_MODEL_PACKAGE="their_models", PYTHONPATH=path)["models"]
    assert models["TheirModel"] == "their_models.mine"
    assert models[ARCHITECTURE] == "sglang_ext.model"


def test_model_stays_on_another_platform(registry, tmp_path):
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.platforms]\nother = other:activate\n")
    (tmp_path / "other.py").write_text(
        "from sglang_ext.cpu.platform import CpuPlatform\n"
        "class Other(CpuPlatform): ...\n"
        "def activate(): return 'other:Other'\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    served = registry("other", SGLANG_PLATFORM="other", PYTHONPATH=path)
    assert served["platform"] == "other"
    assert served["models"][ARCHITECTURE] == "sglang_ext.model"
    assert served["configs"]["qwen3_next"] == "sglang_ext.config"


def test_missing_platform_ends_the_process(tmp_path):
    code = (
        "from sglang_ext import register; register.entry_points = lambda group: ()\n"
        "from sglang.srt.plugins import load_plugins; load_plugins(); print('still here')"
    )
    assert process.run(["-c", code], tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "qnext-plugin-sglang-cpu" in text and "still here" not in text


def test_failure_to_register_ends_the_process(tmp_path):
    """SGLang would log it and serve its own model."""
    code = (
        "import sys; from sglang.srt.plugins import load_plugins; from sglang.srt.utils.hf_transformers import common\n"
        "del common._CONFIG_REGISTRY; load_plugins(); print('still here')"
    )
    assert process.run(["-c", code], tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "qnext-plugin cannot register with this SGLang" in text and "QNEXT_DISABLE=1" in text
    assert "still here" not in text
