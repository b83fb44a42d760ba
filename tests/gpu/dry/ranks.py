"""The other ranks of a tensor-parallel start, which are not there either: what they are sent is recorded."""

import os
from typing import Any

from torch import distributed

from tests.gpu.dry.trace import TRACE


class Nccl:
    """NCCL's library: every function records its call, and what it would write stays unwritten."""

    def __init__(self, *_: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: TRACE.launch("nccl", name)

    def ncclGetRawVersion(self) -> int:
        return 22800

    def ncclGetVersion(self) -> str:
        return "2.28.0"


def pretend(size: int, pynccl: Any, shm_broadcast: Any) -> None:
    """Let this process be the first of ``size`` ranks. The modules are the engine's."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    init, new = distributed.init_process_group, distributed.new_group
    distributed.init_process_group = lambda *_, **__: init("fake", rank=0, world_size=size, store=FakeStore())
    distributed.monitored_barrier = lambda *_, **__: None  # the fake backend has none
    distributed.new_group = lambda ranks=None, *_, **__: new(ranks, backend="fake")
    pynccl.NCCLLibrary = type("Nccl", (Nccl,), {"ncclGetUniqueId": lambda self: pynccl.ncclUniqueId()})
    shm_broadcast.MessageQueue.create_from_process_group = lambda *_, **__: None  # it would wait for its readers
