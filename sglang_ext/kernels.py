"""What serves Gated DeltaNet layers on each device, and the way to packed matrix products on CPUs.

======  ====================================================================================================
device  convolution and delta rule
======  ====================================================================================================
GPU     SGLang's own kernels and choices (``--linear-attn-backend``), on the flat layout
CPU     ``cpu.gated_delta_net``: ``qnext_plugin.ops`` under the names and signatures of SGLang's kernels, any dtype and
        size; decode on float32 states is compiled, as are products with bfloat16 weights (``cpu.gemm``)
======  ====================================================================================================
"""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from sglang_ext.compat import ON_CPU


def register_cpu_kernels() -> None:
    """Register the kernels that SGLang lacks on CPUs, through SGLang's extension point; idempotent."""
    if ON_CPU:
        from sglang_ext.cpu import gemm

        gemm.register()


def plain_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which ``model``'s weights have their declared form, so that some or all can be loaded."""
    if not ON_CPU:
        return nullcontext()
    from sglang_ext.cpu import gemm

    return gemm.plain_weights(model)
