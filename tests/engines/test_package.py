"""The package as users get it: built twice, installed without touching the engine's pins, serving from elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from tests.support.installed import ENGINE

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]
MODELSCOPE = ("modelscope==1.40.2", "modelscope-hub==0.5.1")
CACHE = os.environ.get("QNEXT_ENVS") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qnext-plugin"


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Wheel and sdist of the committed tree, built in two unlike environments."""
    directories = []
    for umask, zone in (("022", "UTC"), ("077", "Asia/Tokyo")):
        directories.append(tmp_path_factory.mktemp("dist"))
        command = f"umask {umask}; exec scripts/build {directories[-1]}"
        env = os.environ | {"TZ": zone, "PYTHON": sys.executable}
        subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, check=True, capture_output=True)
    return directories


def wheels(directory: Path) -> list[str]:
    """What is installed beside this engine on a CPU."""
    return [str(file) for file in directory.glob({"vllm": "qnext_plugin-[0-9]*.whl", "sglang": "*.whl"}[ENGINE])]


def test_build_is_reproducible(dist):
    first, second = ({file.name: file.read_bytes() for file in directory.iterdir()} for directory in dist)
    assert sorted(name.rpartition(".")[2] for name in first) == ["gz", "gz", "whl", "whl"]
    assert first == second


def test_installation_changes_nothing_else(dist):
    report = json.loads(pip("--dry-run", "--no-index", "--report", "-", *wheels(dist[0])))
    names = {item["metadata"]["name"] for item in report["install"]}
    assert "qnext-plugin" in names and names <= {"qnext-plugin", "qnext-plugin-sglang-cpu"}


@pytest.fixture(scope="module")
def modelscope():
    """The real client, kept in the cache folder; it has no part in the engine's environment."""
    target = Path(CACHE).expanduser() / "-".join(MODELSCOPE).replace("==", "-")
    if not target.exists():
        pip("--no-deps", "--target", str(target), *MODELSCOPE)
    return target


def test_wheel_serves_a_modelscope_name_from_elsewhere(dist, modelscope, tmp_path):
    """By way of the example: what ModelScope's client has in its cache, and no path into this repository."""
    pip("--no-deps", "--no-index", "--target", str(tmp_path / "site-packages"), *wheels(dist[0]))
    name = "someone/tiny"
    directory = tmp_path / "modelscope" / "models" / name
    write_random_checkpoint(directory, overrides={"num_hidden_layers": 4})
    # SGLang 0.5.23 asks Hugging Face for the configuration of a name before it asks ModelScope.
    model = {"vllm": name, "sglang": str(directory)}[ENGINE]
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site-packages"), str(modelscope)]),
        "MODELSCOPE_CACHE": str(tmp_path / "modelscope"),
        f"{ENGINE.upper()}_USE_MODELSCOPE": "True",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "offline.py"), ENGINE, model],
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"Qwen3NextForCausalLM is served by {ENGINE}_ext.model" in done.stdout + done.stderr
    assert done.stdout.count(" -> ") == 3
