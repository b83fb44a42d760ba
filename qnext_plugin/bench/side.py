"""One of the models that are compared, served in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from qnext_plugin.engines import process
from qnext_plugin.engines.flags import mtp_flags
from qnext_plugin.verify.runner import NATIVE_MODULES, EngineFailed, failure
from qnext_plugin.verify.scenarios import EngineConfig

TIMEOUT = 7200.0  # seconds for a start, and for all workloads
LONGEST_STEP = 16384  # tokens
# Behind the longest sequence: drafts, what SGLang keeps free, and what a server finds more in a prompt sent as text.
ROOM = 32
Measure = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """``python`` has ``engine`` and this package installed; ``flags`` are the engine's own, and win over ours."""

    name: str
    engine: str
    native: bool = False
    python: str = sys.executable
    flags: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """How the module names of the classes begin that have to serve."""
        return NATIVE_MODULES[self.engine] if self.native else f"{self.engine}_ext."

    @property
    def version(self) -> str:
        """Of the engine."""
        names = "from importlib.metadata import packages_distributions, version\n"
        code = names + f"print(version(packages_distributions()[{self.engine!r}][0]))"
        return subprocess.check_output([self.python, "-c", code], text=True).strip()

    @property
    def environment(self) -> dict[str, str]:
        """On a CPU all cores, unless told otherwise: vLLM leaves one idle by default."""
        chosen = {"QNEXT_DISABLE": "1" if self.native else "0"}
        if not torch.cuda.is_available():
            cores = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
            cores |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
            chosen |= {name: value for name, value in cores.items() if name not in os.environ}
        return chosen


@dataclass(frozen=True)
class Task:
    """What every side does: the ``workloads`` of ``worker.measure``, and the ``prompts`` of decodes, if given."""

    model: str
    workloads: Mapping[str, Mapping[str, int]]
    dtype: str = "bfloat16"
    draft_tokens: int = 0
    prompts: Sequence[Sequence[int]] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with ``ROOM``."""
        lengths = [w["length"] + w.get("output", 0) + 1 for w in self.workloads.values()]
        given = max(map(len, self.prompts), default=0)
        outputs = [given + w["output"] + 1 for w in self.workloads.values() if "output" in w]
        return max(lengths + outputs) + ROOM

    def flags(self, engine: str) -> list[str]:
        """Of the engine's command line: a batch's prompts in one step, no prefix found in a cache."""
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
    """The engine without its server, which starts at once; what is yielded waits for that and measures, each time anew.

    It returns what ``worker.main`` writes, and ``peak_memory``.
    """
    directory.mkdir(parents=True)
    log, spec, before = directory / "log", directory / "spec.json", device_bytes()
    flags = (*task.flags(side.engine), *side.flags)
    config = EngineConfig(
        "",
        dtype=task.dtype,
        compiled=side.engine == "vllm" or torch.cuda.is_available(),
        draft_tokens=task.draft_tokens,
        max_model_len=task.longest,
        flags=flags,
    )
    spec.write_text(
        json.dumps(
            asdict(task) | {"config": asdict(config), "expect_module": side.module, "begun": time.time()},
        )
    )
    command = ["-m", f"{side.engine}_ext.tools.bench", str(spec), str(directory)]
    numbers = count()
    with process.started(command, log, side.environment, side.python) as child:

        def measure() -> dict[str, Any]:
            out = directory / f"{next(numbers)}.json"
            tell(child)
            deadline = time.monotonic() + TIMEOUT
            while not out.exists():
                if child.poll() is not None:
                    raise EngineFailed(f"{side.name}: {failure(log, child.returncode)}", log)
                if time.monotonic() > deadline:
                    raise EngineFailed(f"{side.name}: still running after {TIMEOUT:.0f} s", log)
                time.sleep(0.1)
            found: dict[str, Any] = json.loads(out.read_text())
            return found | peak_memory(child, before)

        yield measure
        assert child.stdin
        child.stdin.close()  # which ends it
        with suppress(subprocess.TimeoutExpired):
            child.wait(20)


def read_once(directory: Path) -> None:
    """So that the first start does not wait for a disk from which the others need nothing any more."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as weights:
            while weights.read(1 << 24):
                pass


def tell(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin
    try:
        child.stdin.write(b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, which is noticed next


def peak_memory(child: subprocess.Popen[bytes], before: int | None) -> dict[str, int]:
    """Of the processes, and on all GPUs what is in use more than ``before``."""
    found = {"peak resident bytes": process.peak_resident_bytes(child.pid)}
    now = device_bytes()
    return found if now is None or before is None else found | {"peak device bytes": now - before}


def device_bytes() -> int | None:
    """In use on all GPUs, which engines do not give back before they end; None without an NVIDIA driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return sum(int(line) << 20 for line in subprocess.check_output(query, text=True).split())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
