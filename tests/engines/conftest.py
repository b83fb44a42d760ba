"""One engine start per configuration and session, shared by every test that asks for it."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext_plugin.engines.config import ENGINES, EngineConfig
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.runner import Run, Start, passes
from qnext_plugin.verify.scenarios import tokens
from tests.support.checkpoints import write_checkpoint
from tests.support.installed import ENGINE, MUTANTS
from tests.support.matrix import CONFIGS, MATRIX, SCENARIOS, scenarios_of
from tests.support.serving import Server, crowded

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

whole = cache(Whole)  # transformers, once for each checkpoint and dtype

SAMPLES, TOKENS = 20_000, 5
SAMPLING_ARGUMENTS = {
    "vllm": {"max_num_seqs": 512},
    "sglang": {"max_running_requests": 256, "max_mamba_cache_size": 264, "skip_tokenizer_init": False},
}[ENGINE]
REGEX = "([a-d][0-9]){12}"
SAMPLING_MUTANT = f"tests.mutants.{ENGINE}:verify_commits_one_step_early"

# Configurations that others cover in part.
EXHAUSTIVE = {"compiled", "mtp1", "mtp3-compiled", "prefix-no-buffer", "prefix-unit", "tp2", "pp2"} | {
    "ep2-mtp2",
    "bfloat16-ep2-mtp2",
}

# Files of tests that hold for one engine only carry its name.
collect_ignore_glob = [f"test_{engine}_*" for engine in ENGINES if engine != ENGINE]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        config = params["mutant"].config if "mutant" in params else params.get("config", params.get("case"))
        if isinstance(config, str) and config in EXHAUSTIVE:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a named checkpoint, written on first use."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: write_checkpoint(root, name))


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str], Start]:
    """What the engine answered to every scenario of a configuration, then to those of its mutants."""
    root = tmp_path_factory.mktemp(ENGINE)

    @cache
    def outcome(config: str) -> Start | EngineFailed:
        start = Start(ENGINE, checkpoint(MATRIX[config].checkpoint), CONFIGS[config], runs(config), root / config)
        try:
            start.run(timeout=600)
        except EngineFailed as e:
            return e
        return start

    def served(config: str) -> Start:
        result = outcome(config)
        if isinstance(result, EngineFailed):
            raise result
        return result

    return served


def runs(config: str) -> list[Run]:
    """The scenarios of a configuration, if it says so again on the warm cache, then its mutants."""
    broken = [mutant for mutant in MUTANTS if mutant.config == config]
    return passes(CONFIGS[config], scenarios_of(config)) + [
        Run(mutant.name, SCENARIOS[mutant.scenario], mutant.path) for mutant in broken
    ]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> dict[int, dict[str, Any]]:
    """What was sampled with 0 and with 2 draft tokens, by mutant."""
    root, drawn = tmp_path_factory.mktemp("sampling"), {}
    for drafts in (0, 2):
        config = EngineConfig(draft_tokens=drafts, num_blocks=8192)
        model, directory = str(checkpoint("tiny")), root / f"{drafts}"
        with started_engine(ENGINE, model, config, directory, arguments=SAMPLING_ARGUMENTS) as engine:
            engine.ready(600)
            drawn[drafts] = engine.call(
                f"tests.workers.{ENGINE}_sampling:sample",
                600,
                prompt=tokens(9, seed=5),
                samples=SAMPLES,
                tokens=TOKENS,
                mutants=[SAMPLING_MUTANT] if drafts else [],
                regex=REGEX,
            )
    return drawn


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def crowded_server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Iterator[Server]:
    with crowded(ENGINE, checkpoint("tiny"), tmp_path_factory.mktemp("crowded") / "log") as server:
        yield server
