"""CUDA without a driver, for one process: ``install(90, ...)`` comes before an engine is imported."""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.gpu.dry import packages
from tests.gpu.dry.compiler import patch_triton
from tests.gpu.dry.device import patch_torch_cuda
from tests.gpu.dry.tensors import PYTHON, Hybrid, data_ptr
from tests.gpu.dry.trace import TRACE


def track_modules() -> None:
    from torch.nn.modules import module as m

    def before(module, args):
        TRACE.modules.append(TRACE.names.get(id(module), TRACE.modules[-1]))

    def after(module, args, output):
        TRACE.modules.pop()

    m.register_module_forward_pre_hook(before)
    m.register_module_forward_hook(after, always_call=True)


def keep_parameter_classes() -> None:
    """Let a parameter on the GPU be of its engine's class, which loads it; torch would make it a mere FakeTensor."""
    new, subclass = torch.nn.Parameter.__new__, torch.Tensor._make_subclass

    @cache
    def both(cls: type) -> type:
        class Same(type(cls)):
            """Engines also ask whether a parameter's type is one of theirs exactly."""

            def __eq__(self, other):
                return other is self or other is cls

            __hash__ = type.__hash__

        return Same(cls.__name__, (cls, FakeTensor), {})

    def new_of_class(cls, data=None, requires_grad=True):
        made = new(cls, data.detach() if isinstance(data, FakeTensor) else data, requires_grad)
        if type(made) is FakeTensor and cls is not torch.nn.Parameter:
            made.__class__ = both(cls)
        return made

    def subclass_of_class(cls, data, requires_grad=False, **kwargs):
        if not isinstance(data, FakeTensor):
            return subclass(cls, data, requires_grad, **kwargs)
        made = data.detach()
        made.__class__ = cls if issubclass(cls, FakeTensor) else both(cls)
        return made

    torch.nn.Parameter.__new__ = staticmethod(new_of_class)
    torch.Tensor._make_subclass = staticmethod(subclass_of_class)


def remember_python_operators() -> None:
    impl = torch.library.Library.impl

    def remember(self, op_name, fn, dispatch_key="", **more):
        if not isinstance(op_name, str):
            name = op_name.name()
        else:
            name = op_name if "::" in op_name else f"{self.ns}::{op_name}"
        if callable(fn) and (dispatch_key or self.dispatch_key or "") in ("CUDA", "CompositeExplicitAutograd", ""):
            PYTHON.setdefault(name.split(".")[0], fn)
        return impl(self, op_name, fn, dispatch_key, **more)

    torch.library.Library.impl = remember


def load_stub() -> None:
    source = Path(__file__).with_name("stub.c")
    target = Path(tempfile.mkdtemp()) / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", target, source], check=True)
    ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)
    os.environ.setdefault("TRITON_LIBCUDA_PATH", str(target.parent))


def install(capability: int, fakes: dict, *, all_configs: bool = False) -> Hybrid:
    """Enter the mode that it returns (``with`` or ``__enter__``) for as long as the engine is to run."""
    torch._dynamo.config.disable = True
    load_stub()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    patch_torch_cuda(capability)
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.data_ptr = data_ptr
    patch_triton(capability, all_configs)
    packages.install()
    track_modules()
    keep_parameter_classes()
    remember_python_operators()
    fake_mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    return Hybrid(fake_mode, fakes)
