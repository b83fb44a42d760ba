"""Tests that need a GPU, and those of them that Triton's interpreter can run without one (``interpreted``)."""

import fcntl
import os
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines.config import MAX_MODEL_LEN
from tests.gpu.results import pytest_addoption, pytest_configure, pytest_runtest_call  # noqa: F401  hooks

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",
    "OMP_NUM_THREADS": "4",
}
# The 80B's layers and heads; fewer layers, experts and ids, for time. "tiny" has states so small that a block is short.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "preset": "tiny",
        "dtype": "float32",
        "overrides": {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "max_position_embeddings": MAX_MODEL_LEN},
    },
    "80b": {
        "preset": "80b",
        "dtype": "bfloat16",
        "overrides": {"num_hidden_layers": 4, "num_experts": 32, "vocab_size": 1024},
    },
    "serving": {"preset": "80b", "dtype": "bfloat16", "overrides": {"num_hidden_layers": 4, "num_experts": 64}},
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available() and not item.get_closest_marker("interpreted"):
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors go. Without a GPU this turns on the interpreter, for the rest of the process."""
    if not find_spec("vllm"):
        pytest.skip("vLLM is not installed")
    if torch.cuda.is_available():
        return "cuda"
    from tests.gpu import interpreter

    interpreter.enable()
    return "cpu"


@pytest.fixture(scope="session")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.config.getoption("--directory") or tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="session")
def child_environment(directory: Path) -> Iterator[None]:
    """Let engines find this clone's entry points, whether or not anything is installed; keep them off the network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / "site-packages" / "qnext_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    path = os.pathsep.join(filter(None, [str(info.parent), str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | os.environ | {"PYTHONPATH": path}).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def checkpoint(directory: Path) -> Callable[[str], Path]:
    """The directory of a checkpoint in ``CHECKPOINTS``, written by the first process that needs it.

    Its draft guesses the next token from the last one alone, as the model nearly does, so that some drafts are accepted
    and some are not, in any model runner and without a hand in the engine.
    """

    def written(name: str) -> Path:
        target = directory / f"checkpoint-{name}"
        with (directory / f"checkpoint-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / "complete").exists():
                write_random_checkpoint(target, **CHECKPOINTS[name])
                for shard in target.glob("*.safetensors"):
                    weights = load_file(shard)
                    if "mtp.fc.weight" in weights:
                        fc = weights["mtp.fc.weight"]
                        fc.copy_(torch.cat([torch.eye(len(fc)), torch.zeros(len(fc), len(fc))], dim=1))
                        save_file(weights, shard, {"format": "pt"})
                (target / "complete").touch()
        return target

    return written
