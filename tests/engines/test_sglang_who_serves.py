"""Our classes serve this architecture, the engine's own when told so, and nothing else is touched."""

import json
import os

import pytest

from qnext_plugin.engines import process
from tests.support.installed import with_platform

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
if sys.argv[3:]:
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
def registry(tmp_path_factory, libraries):
    directory = tmp_path_factory.mktemp("registry")

    def read(name, *options, **env):
        out, log = directory / f"{name}.json", directory / f"{name}.log"
        with libraries.forking():
            assert process.run(["-c", REGISTRY, str(out), ARCHITECTURE, *options], log, env) == 0, process.tail(log)
        return json.loads(out.read_text())

    read.log = lambda name: (directory / f"{name}.log").read_text()
    return read


@pytest.fixture(scope="module")
def ours(registry):
    return registry("ours", "all models")


@pytest.fixture(scope="module")
def off(registry):
    return registry("off", "all models", QNEXT_DISABLE="1")


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


def test_native_class_when_told_so(registry, off):
    for served in (off, registry("another", SGLANG_PLUGINS="another_plugin")):
        assert served["models"][ARCHITECTURE] == "sglang.srt.models.qwen3_next"


def test_external_models_of_the_user_stay(registry, tmp_path):
    package = tmp_path / "their_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("class TheirModel: ...\nEntryClass = TheirModel\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])  # ours may be installed there
    models = registry("external", SGLANG_EXTERNAL_MODEL_PACKAGE="their_models", PYTHONPATH=path)["models"]
    assert models["TheirModel"] == "their_models.mine"
    assert models[ARCHITECTURE] == "sglang_ext.model"


OTHER = "from sglang_ext.cpu.platform import CpuPlatform\nclass Other(CpuPlatform): "


def test_model_stays_on_another_platform(registry, tmp_path):
    env = with_platform(tmp_path, "sglang.srt.platforms", f"{OTHER}...\n")
    served = registry("other", SGLANG_PLATFORM="other", **env)
    assert served["platform"] == "other"
    assert served["models"][ARCHITECTURE] == "sglang_ext.model"
    assert served["configs"]["qwen3_next"] == "sglang_ext.config"


def test_native_class_on_an_accelerator_that_ours_does_not_know(registry, tmp_path):
    env = with_platform(tmp_path, "sglang.srt.platforms", f"{OTHER}device_type = 'other'\n")
    served = registry("unknown", SGLANG_PLATFORM="other", **env)
    assert served["platform"] == "other"
    assert served["models"][ARCHITECTURE] == "sglang.srt.models.qwen3_next"
    assert not served["configs"]["qwen3_next"].startswith("sglang_ext.")
    assert registry.log("unknown").count("the platform is Other. sglang's own model serves") == 1


def test_native_class_when_told_so_by_a_process_that_inherited_our_package(registry):
    served = registry("inherited", QNEXT_DISABLE="1", SGLANG_EXTERNAL_MODEL_PACKAGE="sglang_ext.models")
    assert served["models"][ARCHITECTURE] == "sglang.srt.models.qwen3_next"


def test_failing_import_ends_no_server_of_another_model(tmp_path, libraries):
    """Ours raises when it is built: SGLang would otherwise log the failure and serve its own."""
    code = (
        "import sys; sys.modules['sglang_ext.model'] = None\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.models.registry import ModelRegistry\n"
        "print(ModelRegistry.resolve_model_cls(['Qwen2ForCausalLM'])[0].__module__)\n"
        f"ModelRegistry.resolve_model_cls(['{ARCHITECTURE}'])[0](config=None)"
    )
    with libraries.forking():
        assert process.run(["-c", code], tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "sglang.srt.models.qwen2\n" in text
    assert "ImportError: qnext-plugin cannot import its model" in text and "QNEXT_DISABLE=1" in text


def test_missing_platform_ends_the_process(tmp_path, libraries):
    code = (
        "from sglang_ext import register; register.entry_points = lambda group: ()\n"
        "from sglang.srt.plugins import load_plugins; load_plugins(); print('still here')"
    )
    with libraries.forking():
        assert process.run(["-c", code], tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "qnext-plugin-sglang-cpu" in text and "still here" not in text


def test_failure_to_register_ends_the_process(tmp_path, libraries):
    """SGLang would log it and serve its own model."""
    code = (
        "import sys; from sglang.srt.plugins import load_plugins; from sglang.srt.utils.hf_transformers import common\n"
        "del common._CONFIG_REGISTRY; load_plugins(); print('still here')"
    )
    with libraries.forking():
        assert process.run(["-c", code], tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "qnext-plugin cannot register with this SGLang" in text and "QNEXT_DISABLE=1" in text
    assert "still here" not in text
