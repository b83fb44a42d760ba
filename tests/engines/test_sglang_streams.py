"""Parts of a layer that run beside each other in a captured graph, shown without a GPU."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch


class Streams:
    """What is done with two streams, in order, in the place of CUDA's."""

    def __init__(self, monkeypatch, *, capturing):
        from sglang_ext import streams

        self.done, self.current = [], self.stream("main")
        monkeypatch.setattr(streams, "get_is_capture_mode", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.done.append(f"{name} waits for {other.name}"))

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, what):
        self.done.append(f"{what} on {self.current.name}")
        return what


@pytest.mark.parametrize("capturing", [True, False])
def test_two_parts_of_a_layer_run_beside_each_other_in_a_graph(monkeypatch, capturing):
    from sglang_ext.streams import both

    streams = Streams(monkeypatch, capturing=capturing)
    parts = partial(streams.run, "first"), partial(streams.run, "second")
    assert both(streams.stream("other"), *parts) == ("first", "second")
    assert streams.done == (
        ["other waits for main", "first on main", "second on other", "main waits for other"]
        if capturing
        else ["first on main", "second on main"]
    )
    streams.done.clear()
    both(None, *parts)
    assert streams.done == ["first on main", "second on main"]
