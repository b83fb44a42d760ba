"""What this machine's CPU can do, as far as it decides which products serve; imports nothing that compiles."""

import torch


def multiplies_codes() -> bool:
    """Return whether quantized weights are multiplied as stored here: on x86-64 CPUs with AVX2."""
    return torch.cpu._is_avx2_supported()


def has_amx() -> bool:
    """Return whether torch multiplies bfloat16 with AMX here; a variable of oneDNN's can forbid it."""
    return torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
