"""What a dry run records: each launch, copy and wait for the GPU, with the module that was at it."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

GPUS = {  # capability: name, bytes of memory, multiprocessors, shared memory a block can ask for
    80: ("NVIDIA A100-SXM4-80GB", 80 << 30, 108, 163 << 10),
    90: ("NVIDIA H100 80GB HBM3", 80 << 30, 132, 227 << 10),
    100: ("NVIDIA B200", 180 << 30, 148, 227 << 10),
}


@dataclass
class Launch:
    phase: str
    module: str
    kind: str  # triton, op (aten), custom (C++ operator), jit (CUDA compiled at run time), copy
    name: str
    stream: int
    capturing: bool
    detail: str = ""
    where: str = ""


@dataclass
class Event:
    """Something that waits for the GPU, or depends on data there."""

    kind: str
    phase: str
    module: str
    capturing: bool
    where: str


@dataclass
class Trace:
    launches: list[Launch] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    kernels: dict[int, dict[str, object]] = field(default_factory=dict)
    phase: str = "start"
    modules: list[str] = field(default_factory=lambda: [""])
    models: list[torch.nn.Module] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    capturing: bool = False
    stream: int = 0
    quiet: int = 0

    def name_modules(self, model: torch.nn.Module, prefix: str = "") -> None:
        self.models.append(model)
        for name, module in model.named_modules():
            self.names.setdefault(id(module), f"{prefix}{name}")

    def launch(self, kind: str, name: str, detail: str = "") -> None:
        if not self.quiet:
            self.launches.append(
                Launch(self.phase, self.modules[-1], kind, name, self.stream, self.capturing, detail, where())
            )

    def event(self, kind: str) -> None:
        if not self.quiet:
            self.events.append(Event(kind, self.phase, self.modules[-1], self.capturing, where(4)))

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        old, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = old

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1


TRACE = Trace()
SKIP = ("/torch/", "gpu/dry/", "/triton/", "contextlib.py", "functools.py")


def where(depth: int = 1) -> str:
    """The innermost frames that are not torch's or ours, innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < depth:
        file = frame.f_code.co_filename
        if not any(part in file for part in SKIP):
            found.append(f"{short(file)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def short(file: str) -> str:
    return file.split("site-packages/")[-1].replace(os.getcwd() + "/", "")


def compact(error: BaseException) -> str:
    """A traceback without torch's and Triton's own frames."""
    if os.environ.get("GPU_DRY_FULL"):
        return "".join(traceback.format_exception(error, chain=False))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in SKIP)]
    lines = [f"  {short(f.filename)}:{f.lineno} {f.name}: {f.line}" for f in frames]
    return "\n".join([*lines, f"{type(error).__name__}: {str(error)[:1500]}"])
