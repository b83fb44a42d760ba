"""What of vLLM asks the driver itself, and labels of its phases."""

from collections import Counter

import torch

from tests.gpu.dry.ranks import pretend
from tests.gpu.dry.trace import TRACE


def apply(ranks: int) -> None:
    from vllm import platforms

    platforms.builtin_platform_plugins["cuda"] = lambda: "vllm.platforms.cuda.CudaPlatform"  # it would ask NVML
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda fn: fn()  # a process of its own would ask the driver
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators import pynccl, shm_broadcast

    pretend(ranks, pynccl, shm_broadcast)
    parallel_state._node_count = lambda group: 1  # ranks would find each other by shared memory
    label()


def around(cls: type, name: str, phase) -> None:
    """Label what happens inside a method with ``phase(self, *arguments)``, unless that is empty."""
    original = getattr(cls, name)

    def labelled(self, *args, **kwargs):
        with TRACE.during(phase(self, *args, **kwargs) or TRACE.phase):
            return original(self, *args, **kwargs)

    setattr(cls, name, labelled)


def label() -> None:
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu import model_runner as v2

    seen: Counter[str] = Counter()  # batches of the same lengths
    for module in (v1, v2):
        runner = module.GPUModelRunner
        load = runner.load_model

        def named(self, *args, load=load, **kwargs):
            result = load(self, *args, **kwargs)
            TRACE.name_modules(self.get_model())
            draft = getattr(self, "speculator", None) or getattr(self, "drafter", None)
            if isinstance(getattr(draft, "model", None), torch.nn.Module):
                TRACE.name_modules(draft.model, "draft:")
            return result

        runner.load_model = named

        def step(self, scheduler_output, *_, **__):
            counts = list(scheduler_output.num_scheduled_tokens.values())
            if not counts or TRACE.phase.startswith(("capture", "profile")):
                return ""
            seen[str(counts)] += 1
            return f"run {counts}" + (f" {seen[str(counts)]}" if seen[str(counts)] > 1 else "")

        around(runner, "execute_model", step)
        around(runner, "profile_run", lambda *_, **__: "profile")
    around(
        v1.GPUModelRunner,
        "_dummy_run",
        lambda self, num_tokens, *_, **__: (
            f"{TRACE.phase.split(' ')[0]} {num_tokens}" if TRACE.phase.startswith("capture") else ""
        ),
    )
    around(v1.GPUModelRunner, "capture_model", lambda *_, **__: "capture")
    manager = cudagraph_utils.CudaGraphManager
    capture = manager.capture

    def each(self, create_forward_fn, *args, **kwargs):
        old = TRACE.phase

        def create(desc, *more, **rest):
            profiling = "profile " if self._max_full_descs_to_capture is not None else ""
            what = type(self).__name__.removesuffix("CudaGraphManager")
            TRACE.phase = f"{profiling}capture {what} {desc.num_tokens} tokens of {desc.num_reqs}"
            return create_forward_fn(desc, *more, **rest)

        try:
            return capture(self, create, *args, **kwargs)
        finally:
            TRACE.phase = old

    manager.capture = each
