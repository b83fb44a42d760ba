"""Triton's driver for a GPU that is not there.

Every launch goes through Triton's own binder and compiler to a cubin for the GPU's architecture; shared memory is held
against the limit; the launch itself does nothing.
"""

import time
from types import SimpleNamespace

import torch

from tests.gpu.dry.trace import GPUS, TRACE, short


class Driver:
    """What Triton asks of a GPU. ``load_binary`` is given a compiled kernel, and the launcher counts."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        self.target, self.shared = GPUTarget("cuda", capability, 32), GPUS[capability][3]
        self.sms = GPUS[capability][2]
        self.map_python_to_cpp_type = lambda ty: CudaDriver.map_python_to_cpp_type(self, ty)
        self.utils = SimpleNamespace(
            get_device_properties=self.properties, load_binary=self.load_binary, unload_module=lambda module: None,
            fill_tma_descriptor=lambda *_: None, fill_tma_descriptor_tiled=lambda *_: None,
            fill_tma_descriptor_im2col=lambda *_: None, set_printf_fifo_size=lambda *_: None,
            cuOccupancyMaxActiveClusters=lambda *_: 1,
        )  # fmt: skip
        self.launcher_cls = self.launcher

    def properties(self, device):
        return {
            "max_shared_mem": self.shared, "multiprocessor_count": self.sms, "max_num_regs": 65536, "warpSize": 32,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 5120,
        }  # fmt: skip

    def load_binary(self, name, kernel, shared, device):
        assert kernel, f"{name}: no cubin"
        return (1, 1, 0, 0, 1024)

    def launcher(self, src, metadata):
        name = f"{src.fn.__module__.split('.')[-1]}.{src.fn.__name__}" if hasattr(src, "fn") else metadata.name

        def run(*args, **__):
            TRACE.launch("triton", name)

        return run

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device): ...
    def get_current_stream(self, device):
        return TRACE.stream

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1, device="cuda")

    def clear_cache(self, cache): ...
    def get_benchmarker(self):
        def bench(kernel_call, *, quantiles=None, **_):
            kernel_call()
            return [1.0] * len(quantiles or (1,))

        return bench

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args

    def allocate_default_profile_scratch(self, size, alignment, stream):
        return torch.zeros(size, dtype=torch.int8, device="cuda")


def patch_triton(capability: int, all_configs: bool) -> None:
    import triton
    from triton.compiler import compiler
    from triton.runtime import autotuner, jit
    from triton.runtime import driver as runtime_driver

    runtime_driver.set_active(Driver(capability))
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8))
    original = compiler.compile

    def compile(src, target=None, options=None, **more):
        name = getattr(getattr(src, "fn", None), "__name__", str(src))
        begin = time.time()
        facts = {
            "name": name,
            "phase": TRACE.phase,
            "module": TRACE.modules[-1],
            "error": "",
            "shared": None,
            "cubin": 0,
        }
        fn = getattr(src, "fn", None)
        facts["file"] = (
            short(fn.__code__.co_filename) if hasattr(fn, "__code__") else short(getattr(fn, "file_name", ""))
        )
        facts["signature"] = {k: v for k, v in getattr(src, "signature", {}).items() if v != "constexpr"}
        facts["constants"] = {
            str(k): v for k, v in getattr(src, "constants", {}).items() if isinstance(v, (int, float, bool, str))
        }
        facts["aligned"] = sum(bool(v) for v in getattr(src, "attrs", {}).values())
        facts["options"] = (
            {k: (options or {}).get(k) for k in ("num_warps", "num_stages")} if isinstance(options, dict) else {}
        )
        TRACE.kernels[len(TRACE.kernels)] = facts
        try:
            with TRACE.silent():
                kernel = original(src, target=target, options=options, **more)
        except Exception as e:
            facts["error"] = f"{type(e).__name__}: {e}"[:600]
            raise
        facts["shared"], facts["cubin"] = kernel.metadata.shared, len(kernel.asm.get("cubin", b""))
        facts["options"] = {
            "num_warps": kernel.metadata.num_warps,
            "num_stages": getattr(kernel.metadata, "num_stages", None),
        }
        facts["seconds"] = round(time.time() - begin, 1)
        limit = GPUS[capability][3]
        if facts["shared"] > limit:
            facts["error"] = f"shared memory {facts['shared']} above {limit}"
        return kernel

    compiler.compile = compile
    create_binder = jit.JITFunction.create_binder

    def binder(self):
        result = create_binder(self)
        self.compile = compile
        return result

    jit.JITFunction.create_binder = binder
    if not all_configs:
        run = autotuner.Autotuner.run

        def first(self, *args, **kwargs):
            """Run one configuration, the first that compiles within the shared memory, instead of a race."""
            if len(self.configs) > 1:
                self.nargs = dict(zip(self.arg_names, args, strict=False))
                pruned = list(self.prune_configs(kwargs)) or self.configs
                last = None
                for config in pruned:
                    self.configs, kept = [config], self.configs
                    try:
                        return run(self, *args, **kwargs)
                    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as e:
                        last = e
                    finally:
                        self.configs = kept
                raise last
            return run(self, *args, **kwargs)

        autotuner.Autotuner.run = first
