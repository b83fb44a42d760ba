"""Everything that needs a GPU, checked and measured in one go: ``scripts/gpu-check``.

Each worker is a process of its own that writes a line per check; a worker that dies, hangs or runs out of time loses
nothing but the check it was at. Without a GPU it runs what a CPU can and lists what it left out.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check import report
from bench.gpu_check.engines import STARTS, left_out
from bench.gpu_check.report import FAILED, LEFT_OUT, OK, RESTART, RUNNING

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",
    "OMP_NUM_THREADS": "4",
}
# Engines that start beside each other; each wants a few cores and 8 GiB of the GPU.
AT_ONCE = 5
GRACE = 5  # seconds past its deadline in which a worker may end by itself
SECTIONS = ("kernels", "engines", "timing", "serving")
# By when, as a share of all the time, a phase has to end; what it does not use goes to the next.
PHASES = ((("kernels", "engines"), 0.5), (("timing",), 0.7), (("serving",), 1.0))


@dataclass
class Worker:
    name: str
    section: str
    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    deadline: float = field(default=0.0)

    @property
    def records(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def start(self, deadline: float) -> None:
        self.starts, self.deadline = self.starts + 1, deadline
        command = [sys.executable, "-m", *self.command, "--out", str(self.records), "--deadline", str(deadline)]
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT | os.environ, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether it is over, having killed it past its deadline and started it again where that helps."""
        assert self.process is not None
        status = self.process.poll()
        if status is None and time.time() < self.deadline + GRACE:
            return False
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
        self.process.wait()
        if status is not None and (status == RESTART or status < 0) and self.starts < 8:
            self.start(self.deadline)
            return False
        reason = "still running when its time was up" if status is None else f"its process ended with status {status}"
        done = report.Report(self.section, self.records, self.deadline)  # what was running has failed
        if status is None or (status not in (0, 1) or not done.known):
            tail = (self.folder / f"{self.name}.log").read_text(errors="replace")[-3000:]
            done.add(self.name, FAILED, reason=reason, trace=tail)
        return True


def workers(args: argparse.Namespace, folder: Path, gpu: bool) -> Iterator[Worker]:
    """In the order of what is worth most."""
    quick = ["--quick"] if args.quick else []
    if args.engine == "vllm":
        yield Worker("kernels", "kernels", ["bench.gpu_check.kernels", *quick], folder)
    if gpu:
        for name, start in STARTS.items():
            if args.engine == start.engine and (start.quick or not args.quick):
                yield Worker(name, "engines", ["bench.gpu_check.engines", name], folder)
    if gpu and args.engine == "vllm":
        yield Worker("prepare", "engines", ["bench.gpu_check.serving", "--prepare"], folder)
        yield Worker("timing", "timing", ["bench.ops", *quick], folder)
        yield Worker("serving", "serving", ["bench.gpu_check.serving", *quick], folder)


def run(todo: list[Worker], deadline: float, state: "State") -> None:
    """Run workers, a few at once, until all have ended or time is up."""
    waiting, running = list(todo), []
    while waiting or running:
        if time.time() > deadline:
            waiting, late = [], waiting
            for worker in late:
                state.extra.append(_record(worker.section, worker.name, LEFT_OUT, "out of time"))
        while waiting and len(running) < AT_ONCE:
            worker = waiting.pop(0)
            worker.start(deadline)
            running.append(worker)
        running = [worker for worker in running if not worker.ended()]
        state.save()
        time.sleep(0.5)


@dataclass
class State:
    """All records so far and the file that always holds them."""

    about: dict[str, Any]
    folder: Path
    file: Path | None
    extra: list[dict[str, Any]] = field(default_factory=list)
    shown: set[tuple[str, str]] = field(default_factory=set)

    def records(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob("*.jsonl"), key=lambda f: f.stat().st_mtime)
        return [record for file in files for record in report.read(file).values()] + self.extra

    def save(self) -> None:
        records = self.records()
        for record in records:
            key = (record["section"], record["check"])
            if record["status"] != RUNNING and key not in self.shown:
                self.shown.add(key)
                print(report.line(record), flush=True)
        if self.file:
            draft = self.file.with_name(self.file.name + ".part")
            draft.write_text(json.dumps({"kind": "gpu-check"} | self.about | {"checks": records}, indent=1) + "\n")
            draft.replace(self.file)


def _record(section: str, check: str, status: str, reason: str) -> dict[str, Any]:
    return {"section": section, "check": check, "status": status, "seconds": 0.0, "reason": reason}


def register(folder: Path) -> None:
    """Let the engines find this clone's entry points, whether or not anything is installed."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    info = folder / "site-packages" / "qnext_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    path = [str(info.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))


def machine() -> dict[str, Any]:
    """Asked of a process of its own: torch keeps what it opens of a GPU."""
    code = (
        "import json, torch\n"
        "gpu = torch.cuda.is_available()\n"
        "print(json.dumps({'gpu': torch.cuda.get_device_name() if gpu else None, 'torch': torch.__version__,\n"
        "    'capability': list(torch.cuda.get_device_capability()) if gpu else None, 'cuda': torch.version.cuda}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if found.returncode:
        raise SystemExit(f"torch does not import:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and engine starts: about 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, written after every check")
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="just this section; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends, whatever is left (default 9)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where logs and checkpoints go (default: temporary)")
    args = parser.parse_args()
    begin = time.time()
    about = machine()
    gpu = about["gpu"] is not None
    about |= {
        "command": "scripts/gpu-check " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{about['gpu'] or 'no GPU: the kernels run in an interpreter'}, torch {about['torch']}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["QNEXT_GPU_CHECK"] = str(folder)
        register(folder)
        state = State(about, folder, args.json)
        todo = list(workers(args, folder, gpu))
        state.extra += [_record("engines", what, LEFT_OUT, reason) for what, reason in left_out()]
        for section in SECTIONS:
            if not any(worker.section == section for worker in todo):
                reason = "no GPU" if not gpu else f"not written for {args.engine}"
                state.extra.append(_record(section, section, LEFT_OUT, reason))
        try:
            wanted = [w for w in todo if w.section in (args.only or SECTIONS)]
            for sections, share in PHASES:
                chosen = [w for w in wanted if w.section in sections]
                last = chosen[-1:] == wanted[-1:]
                run(chosen, begin + 60 * args.minutes * (1.0 if last else share), state)
        finally:
            for worker in todo:
                if worker.process and worker.process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(worker.process.pid, signal.SIGKILL)
            state.about["seconds"] = round(time.time() - begin)
            state.save()
        records = state.records()
    counts = {status: sum(r["status"] == status for r in records) for status in (OK, FAILED, LEFT_OUT)}
    if counts[FAILED]:
        print("\nfailed:")
        for record in records:
            if record["status"] == FAILED:
                print(report.line(record))
    print(f"\n{counts[OK]} ok, {counts[FAILED]} failed, {counts[LEFT_OUT]} left out in {time.time() - begin:.0f} s")
    return 1 if counts[FAILED] or not counts[OK] else 0


if __name__ == "__main__":
    raise SystemExit(main())
