"""Kernels that SGLang and FlashInfer compile with nvcc when first called: recorded, not built."""

import functools
import os
import sys
import time
from types import SimpleNamespace

from tests.gpu.dry.tensors import shapes, tensors
from tests.gpu.dry.trace import GPUS, TRACE


class Module:
    """Every attribute is a function that records its call and writes nothing."""

    def __init__(self, name: str, spec=None) -> None:
        self._name, self._spec = name, spec

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def __call__(self, *args, **kwargs):
        return self._call("__call__", *args, **kwargs)

    def _call(self, name: str, *args, **kwargs):
        given = tensors((args, kwargs))
        wrong = [x for x in given if x.device.type != "cuda" and x.numel() and x.dim()]
        if wrong:
            TRACE.event(f"{self._name}.{name} is given {len(wrong)} CPU tensor(s): {shapes(wrong)}")
        TRACE.launch("jit", f"{self._name}.{name}", shapes(given))


SPECS: list[tuple] = []
BUILT: dict[str, float] = {}  # seconds


def replace_everywhere(name: str, old, new) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def patch_sglang(nvcc: bool) -> None:
    """``nvcc``: build them for this capability all the same (the result needs a driver to be loaded, so it is not)."""
    from sglang.kernels.jit.utils.compile import loader

    old = loader.load_jit
    loader._load = lambda library: SPECS.append((library.name,)) or library

    def load_jit(*args, **kwargs):
        name = "_".join(map(str, args))[:60]
        if nvcc:
            begin = time.time()
            old(*args, **kwargs)
            BUILT[name] = round(time.time() - begin, 1)
        return Module(name)

    replace_everywhere("load_jit", old, load_jit)


def patch_flashinfer() -> None:
    from flashinfer import sampling
    from flashinfer.gemm import gemm_base
    from flashinfer.jit import core

    sampling.get_seed_and_offset = lambda *_, **__: (1, 0)
    product = Module("flashinfer.fp8_blockscale_gemm_sm90")
    runner = SimpleNamespace(get_workspace_size=lambda *_: 0, run_gemm=product.run_gemm)
    gemm_base.get_fp8_blockscale_gemm_runner_sm90 = lambda: runner
    core.JitSpec.build_and_load = lambda self, *_, **__: Module(f"flashinfer.{self.name}")


def patch_cute(capability: int) -> None:
    """Kernels in CuTe's DSL are compiled as they would be (to a cubin for this capability); calls are recorded."""
    os.environ["CUTE_DSL_ARCH"] = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}[capability]
    from cutlass.base_dsl.runtime import cuda as driver
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    attributes = {"MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": GPUS[capability][3] + 1024,
                  "COMPUTE_CAPABILITY_MAJOR": capability // 10, "COMPUTE_CAPABILITY_MINOR": capability % 10,
                  "MULTIPROCESSOR_COUNT": GPUS[capability][2]}  # fmt: skip
    driver.get_device_attribute = lambda attribute, device_id=0: attributes[
        attribute.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
    ]

    def call(self, *args, **kwargs):
        name = getattr(self, "function_name", None) or type(self).__name__
        TRACE.launch("cute", str(name)[:90], shapes(tensors((args, kwargs))))

    for cls in (
        provider.TVMFFIJitCompiledFunction,
        provider.TVMFFIJitCompiledFunctionWithKwargs,
        provider.CudaDialectJitCompiledFunction,
    ):
        cls.__call__ = call
