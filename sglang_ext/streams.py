"""Runs two parts of a layer beside each other on a GPU."""

from collections.abc import Callable
from typing import TypeVar

import torch
from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode
from sglang.srt.runtime_context import get_stream
from sglang.srt.utils import is_cuda

First = TypeVar("First")
Second = TypeVar("Second")


def second_stream() -> torch.cuda.Stream | None:
    """Return SGLang's stream for work beside the main one, None without a GPU; a layer asks when it is built."""
    return get_stream("alt") if is_cuda() else None


def both(
    stream: torch.cuda.Stream | None, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """Call both functions and return both results; in a captured CUDA graph ``second`` runs on ``stream``.

    Neither may write what the other reads. Outside of graphs a small step waits for its launches and not for kernels,
    so a second stream would not help.
    """
    if stream is None or not get_is_capture_mode() or torch.compiler.is_compiling():
        return first(), second()
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    one = first()
    with torch.cuda.stream(stream):
        other = second()
    current.wait_stream(stream)
    return one, other
