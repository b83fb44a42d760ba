"""One engine start per configuration and session, shared by every test that asks for it.

What is marked ``exhaustive``, which only ``scripts/test --all`` runs, and what covers it in kind otherwise:

- starts ``compiled``, ``mtp3-compiled``: ``bfloat16-compiled``, and the compiled server of ``test_vllm_server``
- ``mtp1``: ``mtp2`` and ``mtp3``; its aborts: ``mtp2-starved``
- ``dflash-head``: ``eagle3-head``
- ``second-runner-*``: ``test_vllm_gpu_check`` for the kernels; ``mtp2`` and ``mtp3`` in the first runner
- ``mtp3-by-batch``: ``ngram3`` for numbers of drafts that differ, none included; ``mtp3-adaptive``: ``mtp3``
- ``prefix-no-buffer``: ``mtp1-no-buffer``; ``eagle3-prefix``: ``ngram`` and ``standalone``
- ``tp2``, ``pp2``: ``tp2-mtp2``, ``pp2-mtp2``
- ``ep2-mtp2``, ``bfloat16-ep2-mtp2``: experts in parallel in ``test_vllm_executors``
- ``test_*_quantized``, two processes: two formats there, and each format in one process
- ``test_*_loading``, five formats: two formats there; each format in one process in ``test_*_quantized``
- ``test_vllm_server``, compiled on two ranks: on one there, and ``tp2-mtp2``
- ``test_vllm_server``, YaRN in config.json: ``odd-a`` to ``odd-c``, and the case that overrides it
- ``test_vllm_long_context``: the same for YaRN, ``chunked`` for prompts in pieces
- ``test_vllm_executors``, experts sharded: experts in parallel there; Ray and ``test_nodes``: ``tp2-mtp2``
- ``test_coder_tools``, strict arguments of a named function by two APIs: by the third, and by all without strict
- ``test_lora`` without drafts: the same with them; what does not fit: ``test_sglang_lora_rows``, ``tests/test_lora.py``
- ``test_verify``, an engine that does not start: ``test_*_bad_input``, ``tests/test_verify_judgement.py``
- ``test_bench``: ``tests/test_bench.py``, and for the way to an engine ``test_verify``
- what loads a checkpoint with packed words where vLLM lacks their operator: ``gptq`` of the same
- ``test_*_dry_run``, other starts than the first: the first, and the record of all in ``tests/test_gpu_dry_run.py``
- ``test_vllm_scattered_tokens`` with two ranks: its other tests
- ``test_package``: ``scripts/setup``, which builds and installs the package that all tests here import
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from qnext_plugin.engines import process
from qnext_plugin.engines.config import ENGINES
from qnext_plugin.engines.process import EngineFailed
from qnext_plugin.verify.runner import Start
from tests.support.checkpoints import write_checkpoint
from tests.support.drafts import FLAGS
from tests.support.installed import ENGINE
from tests.support.matrix import CONFIGS, MATRIX
from tests.support.sampling import draw
from tests.support.starts import runs
from tests.support.warm import ENVIRONMENT, LIBRARIES, MODULES, Warm

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

# Configurations that others cover in part.
EXHAUSTIVE = {"compiled", "mtp1", "mtp3-compiled", "prefix-no-buffer", "prefix-unit", "tp2", "pp2"} | {
    "ep2-mtp2",
    "bfloat16-ep2-mtp2",
    "dflash-head",
    "eagle3-prefix",
    "second-runner",
    "second-runner-mtp2",
    "second-runner-cpu",
    "second-runner-gpu",
    "mtp3-by-batch",
    "mtp3-adaptive",
}

# Files of tests that hold for one engine only carry its name.
collect_ignore_glob = [f"*test_{engine}_*" for engine in ENGINES if engine != ENGINE]


def starting(config: str, warm: Warm) -> AbstractContextManager[Any]:
    """While this lasts, processes are started as the configuration asks for."""
    if mode := MATRIX[config].interpreted:
        started = process.started

        def interpreted(command: Sequence[str], *args: Any) -> AbstractContextManager[Any]:
            return started(("-m", "tests.gpu.vllm_interpreted", *command[2:], mode), *args)

        return patch.object(process, "started", interpreted)
    return nullcontext() if CONFIGS[config].compiled else warm.forking()  # a compiler has threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if ENGINE in ([mark.args[0] for mark in item.iter_markers("only")] or [ENGINE])]
    for item in (item for item in items if item.path.is_relative_to(Path(__file__).parent)):
        item.add_marker(pytest.mark.engine)
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
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The process that has imported the engine, for starts whose process need not be a new one."""
    warm = Warm(MODULES[ENGINE], tmp_path_factory.mktemp("warm") / "log", ENVIRONMENT[ENGINE])
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The process that has imported what the engine imports, for those that have to import the engine themselves."""
    libraries = Warm(LIBRARIES[ENGINE], tmp_path_factory.mktemp("libraries") / "log", {})
    yield libraries
    libraries.close()


@pytest.fixture(scope="session")
def serve(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], warm: Warm
) -> Callable[[str], Start]:
    """What the engine answered to every scenario of a configuration, then to those of its mutants."""
    root = tmp_path_factory.mktemp(ENGINE)

    @cache
    def outcome(config: str) -> Start | EngineFailed:
        case, chosen = MATRIX[config], CONFIGS[config]
        directory = checkpoint(case.checkpoint)
        if case.drafts != "mtp":
            drafts = FLAGS[ENGINE](case.drafts, chosen.draft_tokens, directory)
            chosen = replace(chosen, flags=(*chosen.flags, *drafts))
        start = Start(ENGINE, directory, chosen, runs(config), root / config)
        try:
            with starting(config, warm):
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


@pytest.fixture(scope="session")
def samples(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], warm: Warm
) -> dict[int, dict[str, Any]]:
    """What was sampled with 0 and with 2 draft tokens, by mutant."""
    root = tmp_path_factory.mktemp("sampling")
    with warm.forking():
        return {drafts: draw(checkpoint("tiny"), drafts, root) for drafts in (0, 2)}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
