"""vLLM's Triton kernels on a CPU, in Triton's interpreter: slow, and right for small shapes."""

import os
import sys
from types import SimpleNamespace
from typing import Any


def enable_triton() -> None:
    """Before the first import of Triton, and only in a process that does nothing else; Triton finds a driver.

    On a CPU vLLM turns Triton off where there is none.
    """
    if "triton" in sys.modules:
        raise RuntimeError("Triton is imported already, so its interpreter cannot be turned on: run scripts/gpu-check")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

        @staticmethod
        def get_benchmarker() -> Any:
            return lambda kernel, quantiles: [1.0] * len(quantiles)  # any configuration will do

    triton.backends.backends["cpu"] = SimpleNamespace(driver=Driver)

    # vLLM's convolution replaces pointers in what it is handed to compute its grid; the compiler ignores that.
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    init = GridExecutor.__init__

    def init_with_own_arguments(self: GridExecutor, fn: Any, arg_names: Any, grid: Any, *hooks: Any) -> None:
        init(self, fn, arg_names, (lambda args: grid(dict(args))) if callable(grid) else grid, *hooks)

    GridExecutor.__init__ = init_with_own_arguments

    # A mask computed from a loop's index is an integer array, which the interpreter's own loads and stores refuse.
    def boolean(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = lambda self, ptrs, mask, *rest: load(self, ptrs, boolean(mask), *rest)
    InterpreterBuilder.create_masked_store = lambda self, ptrs, value, mask, *rest: store(
        self, ptrs, value, boolean(mask), *rest
    )

    # bfloat16 is kept as its bits, and the interpreter computes with those.
    dot, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def to_float(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def float_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, to_float(self, a), to_float(self, b), *rest)

    def float_op(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        out = binary_op(self, to_float(self, lhs), to_float(self, rhs), op)
        rounds = lhs.dtype.scalar == rhs.dtype.scalar == tl.bfloat16 and out.data.dtype != bool
        return self.cast_impl(out, tl.bfloat16) if rounds else out

    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = float_dot, float_op


def enable() -> None:
    """As ``enable_triton``, for our GPU layer: vLLM is told that this CPU is a device it does not know.

    So it does not put its C++ kernels in place of the Triton ones.
    """
    enable_triton()
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import PlatformEnum

    class Interpreted(CpuPlatform):
        _enum = PlatformEnum.OOT

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 1

    vllm.platforms._current_platform = Interpreted()
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON, "vLLM still has Triton turned off"
    enable_delta_rule()


def enable_delta_rule() -> None:
    """After ``enable_triton``: for the kernels that vLLM has taken from flash-linear-attention."""
    import vllm.third_party.flash_linear_attention.ops as ops

    repair(ops.__name__, ops.chunk_delta_h)


def repair(package: str, *with_loops: Any) -> None:
    """Repair the imported modules of a package with flash-linear-attention's kernels, and those of their loops."""
    import triton.language as tl
    from triton.runtime.interpreter import _implicit_cvt

    # The interpreter replaces `tl.exp` while a kernel runs, but not the names that these modules have given it.
    for module in [m for name, m in sys.modules.items() if name.startswith(f"{package}.")]:
        for name in ("exp", "exp2", "log", "log2"):
            if hasattr(module, name):
                setattr(module, name, lambda x, name=name: getattr(tl, name)(x))
    for module in with_loops:  # Nor are the indices of loops tensors, as they are on a device.
        module.range = lambda *bounds: map(_implicit_cvt, range(*bounds))
