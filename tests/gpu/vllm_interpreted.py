"""A process in which vLLM's second model runner runs on a CPU, with its Triton kernels in Triton's interpreter.

``python -m tests.gpu.vllm_interpreted DIRECTORY MODE`` does what ``qnext_plugin.engines.worker`` does. Modes:

- ``cpu``: as on a CPU for which there is Triton
- ``runner``: the runner does what it does on a GPU
- ``kernels``: our Gated DeltaNet layers as well; attention, experts and products stay those of a CPU
"""

import sys
from importlib import reload
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from qnext_plugin.engines import worker
from tests.gpu import interpreter


def run_as_on_a_gpu() -> None:
    """Let vLLM schedule ahead of the device, and share metadata among groups of layers.

    These share all but the slots, which one kernel looks up for all groups.
    """
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext

    update = CpuPlatform.check_and_update_config
    build, look_up = GDNAttentionMetadataBuilder.__init__, MambaSpecDecodeGPUContext.compute_aligned_state_indices

    class OnDevice(torch.Tensor):
        is_cuda = True

    def updated(vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.supports_update_block_table, self.mamba_aligned_state_indices = True, None

    def looked_up(self: Any, seq_lens: torch.Tensor, num_reqs: int) -> torch.Tensor:
        return look_up(self, seq_lens.as_subclass(OnDevice), num_reqs)

    CpuPlatform.check_and_update_config = staticmethod(updated)
    GDNAttentionMetadataBuilder.__init__ = built
    MambaSpecDecodeGPUContext.compute_aligned_state_indices = looked_up


def take_gpu_kernels() -> None:
    """Let our layers take their kernels for GPUs, and states as these lay them out."""
    from vllm.model_executor.layers.mamba.ops import causal_conv1d
    from vllm.platforms.cpu import CpuPlatform

    import vllm_ext.kernels
    import vllm_ext.state

    with patch.object(CpuPlatform, "is_cpu", lambda self: False):
        reload(causal_conv1d)  # on a CPU it puts functions in C++ in place of its own
    interpreter.enable_delta_rule()
    vllm_ext.kernels.current_platform = vllm_ext.state.current_platform = SimpleNamespace(is_cpu=lambda: False)


def copy_states_in_one_piece() -> None:
    """A sixteenth of the programs of two kernels that run for each state of each request, nearly always for nothing."""
    from vllm.v1.worker import mamba_utils

    mamba_utils._TEMPORAL_TILES = 1


def main(directory: str, mode: str) -> None:
    interpreter.enable_triton()
    copy_states_in_one_piece()
    if mode in ("runner", "kernels"):
        run_as_on_a_gpu()
    if mode == "kernels":
        take_gpu_kernels()
    worker.main(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
