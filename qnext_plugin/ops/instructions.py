"""What this machine's CPU can do, as far as it decides which products serve; imports nothing that compiles."""

import torch


def multiplies_codes() -> bool:
    """Return whether quantized weights are multiplied as stored here: on x86-64 CPUs with AVX2, unless AMX is in use.

    Where there is AMX, the engines' products of bfloat16 weights use it.
    """
    uses_amx = torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx2_supported() and not uses_amx
