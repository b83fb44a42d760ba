"""Everything in ``tests/gpu`` in one go: ``scripts/gpu-check [OPTIONS] [PYTEST OPTIONS]``.

Each group of tests is a pytest process; one that dies, hangs or runs out of time loses the test it was at, and is
started again for those that are left. Without a GPU it runs what Triton's interpreter can, and says what it left out.
The exit status is 0 if something passed and nothing failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qnext_plugin.engines import process
from tests.gpu import results
from tests.gpu.results import DEVICE_LOST, FAILED, PASSED, RUNNING, SKIPPED

TESTS = "tests/gpu"
GROUPS = {
    "kernels": ["test_layer.py", "test_ops.py"],
    "engines": ["test_engines.py"],
    "files": ["test_serving.py::test_checkpoint"],
    "speed": ["test_speed.py"],
    "serving": ["test_serving.py"],
    "all": [""],
}
# By when, as a share of all the time, groups have to end that run at once; what they do not use goes to the next.
PHASES = ((0.5, ("kernels", "engines", "files")), (0.7, ("speed",)), (1.0, ("serving",)))
WITHOUT_GPU = ((1.0, ("all",)),)
GRACE = 10.0  # seconds past its deadline in which a process may end by itself
SHORTEST = 60.0  # seconds in which a process that is started late can say what it leaves out
MOST_STARTS = 8


@dataclass
class Group:
    """The tests of some files, in a process that is started again where it died."""

    name: str
    arguments: list[str]
    folder: Path
    deadline: float
    starts: int = 0
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def start(self) -> None:
        self.starts += 1
        self.kill_at = max(self.deadline + GRACE, time.time() + SHORTEST)
        self.log = self.folder / f"{self.name}-{self.starts}.log"
        options = ["-p", "no:cacheprovider", "--capture=sys", "--results", str(self.results)]
        options += ["--deadline", str(self.deadline), "--directory", str(self.folder)]
        self.child = self.stack.enter_context(process.started(["-m", "pytest", *options, *self.arguments], self.log))

    def ended(self) -> bool:
        """Whether it is over, having killed it past its deadline and started it again where that helps."""
        status = self.child.poll()
        if status is None and time.time() < self.kill_at:
            return False
        self.stack.close()
        reason = "still running when its time was up" if status is None else f"its process ended with status {status}"
        lost = list(results.unfinished(self.results))
        for test in lost:
            results.add(self.results, test, FAILED, reason=f"{process.tail(self.log)}\n{reason}")
        died = lost or status == DEVICE_LOST or (status is not None and status < 0)
        if died and self.starts < MOST_STARTS:
            self.start()
            return False
        if status not in (0, 1, 5):  # 5: no test was selected
            results.add(self.results, f"{TESTS}/{self.name}", FAILED, reason=f"{process.tail(self.log)}\n{reason}")
        return True


@dataclass
class Record:
    """All results so far, and the file that always holds them."""

    about: dict[str, Any]
    groups: list[Group]
    file: Path | None
    shown: set[str] = field(default_factory=set)

    def results(self) -> list[dict[str, Any]]:
        return list({test: result for g in self.groups for test, result in results.read(g.results).items()}.values())

    def save(self) -> None:
        found = self.results()
        for result in found:
            if result["outcome"] not in (RUNNING, SKIPPED) and result["test"] not in self.shown:
                self.shown.add(result["test"])
                print(results.line(result), flush=True)
        if self.file:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps(self.about | {"results": found}, indent=1) + "\n")
            part.replace(self.file)


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
    return dict(json.loads(found.stdout.splitlines()[-1]))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and engine starts: about 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results, written as they come")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends, whatever is left (default 9)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where logs and checkpoints go (default: temporary)")
    args, more = parser.parse_known_args()
    if not installed("pytest"):
        raise SystemExit("pytest is not installed, and the checks are its tests: pip install pytest")
    begin = time.time()
    about = {"kind": "gpu-check", "command": " ".join(["scripts/gpu-check", *sys.argv[1:]])} | machine()
    about |= {engine: installed(engine) for engine in ("vllm", "sglang") if installed(engine)}
    about |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d")}
    print(
        f"{about['gpu'] or 'no GPU: kernels run in an interpreter, the rest is left out'}, torch {about['torch']}",
        flush=True,
    )
    options = ["-m", "gpu and not exhaustive" if args.quick else "gpu", *more]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.jsonl"):
            old.unlink()
        record = Record(about, [], args.json)
        for share, names in PHASES if about["gpu"] else WITHOUT_GPU:
            running = []
            for name in names:
                arguments = [*options, *(f"{TESTS}/{file}" for file in GROUPS[name])]
                group = Group(name, arguments, folder, begin + 60 * args.minutes * share)
                stack.callback(group.stack.close)
                group.start()
                running.append(group)
            record.groups += running
            while running:
                running = [group for group in running if not group.ended()]
                record.save()
                time.sleep(0.5)
        about["seconds"] = round(time.time() - begin)
        record.save()
        found = record.results()
    left_out = Counter(result["reason"] for result in found if result["outcome"] == SKIPPED)
    failed = [result for result in found if result["outcome"] == FAILED]
    if left_out:
        print("\nleft out:", *(f"{number:4} {reason}" for reason, number in left_out.items()), sep="\n")
    if failed:
        print("\nfailed:", *map(results.line, failed), sep="\n")
    counts = {outcome: sum(result["outcome"] == outcome for result in found) for outcome in (PASSED, FAILED, SKIPPED)}
    print(f"\n{', '.join(f'{n} {outcome}' for outcome, n in counts.items())} in {about['seconds']} s")
    return 1 if counts[FAILED] or not counts[PASSED] else 0


if __name__ == "__main__":
    raise SystemExit(main())
