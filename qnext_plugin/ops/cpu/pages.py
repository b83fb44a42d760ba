"""Memory for packed weights, in huge pages where Linux gives them on request.

Reading a weight once per token touches each page anew: with pages of 4 KiB a core waits for their addresses.
"""

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 2 << 20  # bytes of a huge page


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor, in huge pages but for its ends."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    begin = -(-tensor.data_ptr() // SIZE) * SIZE
    end = (tensor.data_ptr() + tensor.nbytes) // SIZE * SIZE
    if begin < end:
        _libc.madvise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: a kernel without huge pages refuses it
    return tensor


_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
