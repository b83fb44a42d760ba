"""What serves a Gated DeltaNet layer, and matrix products.

======  ====================================================================================================
device  convolution and delta rule
======  ====================================================================================================
GPU     SGLang's own kernels and choices (``--linear-attn-backend``), on the flat layout
CPU     ``cpu.gated_delta_net``: ``qnext_plugin.ops`` behind the names and signatures of SGLang's kernels, any dtype and
        size; decode on float32 states is compiled, as are products with bfloat16 weights (``cpu.gemm``)
======  ====================================================================================================
"""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from sglang_ext.compat import ON_CPU


def prepare_cpu(*, drafts: bool, adapters: bool) -> None:
    """Have SGLang compute on this CPU with kernels of ours, if it is on one; idempotent."""
    if not ON_CPU:
        return
    from sglang_ext.cpu import install

    install.install_cpu_kernels()
    if drafts:
        install.install_cpu_speculation()
    if adapters:
        install.install_cpu_lora()


def plain_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, ``model``'s weights are as they were declared, so that some or all can be loaded."""
    if not ON_CPU:
        return nullcontext()
    from sglang_ext.cpu import gemm

    return gemm.plain_weights(model)
