"""Packed weights lie in memory for which huge pages were asked."""

from pathlib import Path

import pytest
import torch

from qnext_plugin.ops.cpu import gemm_avx2, packer, packing, pages

ROWS, INPUTS = 3000, 2048
FORM = packing.form("i8", torch.float32, INPUTS, INPUTS)


def flags(address: int) -> list[str]:
    """Linux's flags of the mapping that has ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux has no huge pages here")
@pytest.mark.parametrize(
    "pack",
    [
        lambda: pages.empty((ROWS, INPUTS), torch.uint8),
        lambda: packer.pack(FORM, torch.ones(ROWS, INPUTS, dtype=torch.uint8), torch.ones(ROWS, 1)),
        lambda: gemm_avx2.pack(torch.ones(ROWS, INPUTS, dtype=torch.bfloat16)),
    ],
    ids=["empty", "codes", "bfloat16"],
)
def test_huge_pages_are_asked_for(pack):
    packed = pack()
    assert packed.nbytes >= 2 * pages.SIZE
    assert "hg" in flags(packed.data_ptr() + packed.nbytes // 2)


@pytest.mark.parametrize("shape", [(0, 5), (3, 7), (3, 1 << 20)])
def test_memory_is_a_tensor_of_its_shape(shape):
    tensor = pages.empty(shape, torch.int16)
    assert tensor.shape == shape and tensor.dtype == torch.int16 and tensor.is_contiguous()
    tensor.fill_(7)
    assert tensor.eq(7).all()
