"""One of the compared models, served in a separate process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.engines.config import EngineConfig, all_cores, mtp_flags
from qnext_plugin.engines.process import peak_resident_bytes
from qnext_plugin.engines.remote import started_engine
from qnext_plugin.engines.who_serves import native_environment

TIMEOUT = 7200.0  # seconds for a start, and for all workloads
LONGEST_STEP = 16384  # tokens
# Room after the longest sequence for drafts, for what SGLang keeps free, and for the extra tokens that a server may
# find in a prompt sent as text.
ROOM = 32
POOLS: dict[str, dict[str, Any]] = {"vllm": {}, "sglang": {"max_mamba_cache_size": None, "max_total_tokens": None}}
"""These arguments let the engine choose its cache sizes; otherwise it would get our small ones."""
Measure = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """One of the compared models. ``python`` is an interpreter that has ``engine`` and this package installed.

    ``flags`` are the engine's own flags and override ours.
    """

    name: str
    engine: str
    native: bool = False
    python: str = sys.executable
    flags: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version of the engine."""
        names = "from importlib.metadata import packages_distributions, version\n"
        code = names + f"print(version(packages_distributions()[{self.engine!r}][0]))"
        return subprocess.check_output([self.python, "-c", code], text=True).strip()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of the engine. On a CPU it uses all cores, unless the user's variables differ.

        vLLM leaves one core idle by default.
        """
        chosen = native_environment(self.native)
        if not torch.cuda.is_available():
            chosen |= all_cores() | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
        return chosen


@dataclass(frozen=True)
class Task:
    """The work of every side: the ``workloads`` of ``worker.measure`` and, if given, the ``prompts`` of decodes."""

    model: str
    workloads: Mapping[str, Mapping[str, int]]
    dtype: str = "bfloat16"
    draft_tokens: int = 0
    prompts: Sequence[Sequence[int]] = ()

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence, ``ROOM`` included."""
        lengths = [w["length"] + w.get("output", 0) + 1 for w in self.workloads.values()]
        given = max(map(len, self.prompts), default=0)
        outputs = [given + w["output"] + 1 for w in self.workloads.values() if "output" in w]
        return max(lengths + outputs) + ROOM

    def flags(self, engine: str) -> list[str]:
        """Return flags of the engine that compute a batch's prompts in one step and turn off prefix caching."""
        largest = max(workload["batch"] for workload in self.workloads.values())
        together = max(workload["batch"] * workload["length"] for workload in self.workloads.values())
        names = {
            "vllm": ("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--no-enable-prefix-caching"),
            "sglang": ("--context-length", "--max-running-requests", "--chunked-prefill-size", "--disable-radix-cache"),
        }
        length, sequences, step, no_cache = names[engine]
        flags = ["--dtype", self.dtype, length, str(self.longest), sequences, str(largest)]
        flags += [step, str(min(LONGEST_STEP, max(2048, together))), no_cache]
        return flags + mtp_flags(engine, self.draft_tokens)


@contextmanager
def offline(side: Side, task: Task, directory: Path) -> Iterator[Measure]:
    """Start a side's engine without its server, and yield a function that waits for the start and then measures.

    Every call of the function measures again. It returns the ``modules`` of the serving classes, the seconds of the
    start and of the first request, ``ranks``, the results of ``worker.measure`` as ``workloads``, and ``peak_memory``.
    """
    before = device_bytes()
    config = EngineConfig(
        dtype=task.dtype,
        compiled=side.engine == "vllm" or torch.cuda.is_available(),
        draft_tokens=task.draft_tokens,
        max_model_len=task.longest,
        flags=(*task.flags(side.engine), *side.flags),
    )
    started = started_engine(
        side.engine,
        task.model,
        config,
        directory,
        native=side.native,
        env=side.environment,
        python=side.python,
        arguments=POOLS[side.engine],
    )
    with started as engine:
        shortest = min(workload["length"] for workload in task.workloads.values())
        first = engine.send("qnext_plugin.bench.worker:first_request", model=task.model, length=shortest)

        def measure() -> dict[str, Any]:
            about = {"start-up seconds": engine.ready(TIMEOUT), "modules": engine.serving(TIMEOUT)["modules"]}
            about |= engine.receive(first, TIMEOUT)[0]
            found = engine.call(
                "qnext_plugin.bench.worker:measure_engine",
                TIMEOUT,
                model=task.model,
                workloads={name: dict(workload) for name, workload in task.workloads.items()},
                prompts=[list(prompt) for prompt in task.prompts],
            )
            return about | {"workloads": found} | peak_memory(engine.pid, before)

        yield measure


def read_once(directory: Path) -> None:
    """Read all weights once, so that the first start does not wait for the disk longer than later starts do."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as weights:
            while weights.read(1 << 24):
                pass


def peak_memory(group: int, before: int | None) -> dict[str, int]:
    """Return the peak memory of a group's processes, and how much more memory of all GPUs is in use than ``before``."""
    found = {"peak resident bytes": peak_resident_bytes(group)}
    now = device_bytes()
    return found if now is None or before is None else found | {"peak device bytes": now - before}


def device_bytes() -> int | None:
    """Return the bytes in use on all GPUs; None without an NVIDIA driver.

    Engines do not free this memory before they end.
    """
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return sum(int(line) << 20 for line in subprocess.check_output(query, text=True).split())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
