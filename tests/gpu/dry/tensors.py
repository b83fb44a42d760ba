"""Tensors on a GPU that is not there: FakeTensors, while those on the CPU are real.

What an engine computes on the host keeps its values. An operator that mixes devices raises as it would on a GPU.
"""

import contextlib

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.gpu.dry.trace import TRACE

NO_LAUNCH = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "view",
    "_unsafe_view", "_reshape_alias", "set_", "resize_", "record_stream", "is_pinned", "_pin_memory", "is_same_size",
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "storage_offset", "_has_same_storage_numel",
}  # fmt: skip
aten = torch.ops.aten
PYTHON: dict = {}  # operators that are Python functions: they run, for what they launch
HOST = ("c10d", "_c10d_functional", "profiler", "inductor", "debugprims", "quantized", "torchvision")
COPIES = {"copy_", "_to_copy", "clone", "cat", "stack", "index_copy_", "contiguous", "_foreach_copy_"}


class Unpinned(TorchFunctionMode):
    """Nothing can be pinned, and torch asks the driver before an operator is dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and "pin_memory" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        return func(*args, **(kwargs or {}))


def tensors(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class Hybrid(TorchDispatchMode):
    """CPU operators run; those that touch CUDA are shapes only, and are recorded."""

    def __init__(self, fake_mode: fake_tensor.FakeTensorMode, fakes: dict) -> None:
        super().__init__()
        self.fake_mode, self.fakes, self.unpinned = fake_mode, fakes, Unpinned()

    @contextlib.contextmanager
    def again(self):
        """The mode inside its own handler."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __enter__(self):
        self.unpinned.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.unpinned.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        given = tensors((args, kwargs))
        on_gpu = [x for x in given if x.device.type == "cuda"]
        own = func.namespace in ("aten", "prims", "prim")
        on_host = not on_gpu and (own or func.namespace in HOST)
        if on_host and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():  # in inference mode they come whole
            with self.again(), torch._C.DisableTorchFunction():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if "device" in kwargs and device.type == "cuda" and device.index is None:
            kwargs["device"] = torch.device("cuda", 0)
        name = func.overloadpacket.__name__
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        kwargs = {key: value for key, value in kwargs.items() if key != "generator"}  # shapes need none
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
            args = self.unmask(func, args)
        elif func in (aten.nonzero.default, aten.masked_select.default, aten._unique2.default):
            TRACE.event(f"{name}: shape read from the GPU")
            TRACE.launch("op", name, shapes(given))
            if all(host(x) is not None for x in given):
                return tree_map_only(torch.Tensor, self.known, func(*tree_map_only(torch.Tensor, host, args), **kwargs))
            with self.fake_mode:
                if func is aten._unique2.default:
                    x = args[0].reshape(-1)
                    return x, torch.empty_like(x, dtype=torch.int64), torch.empty_like(x, dtype=torch.int64)
                if func is aten.nonzero.default:
                    return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="cuda:0")
                return args[0].reshape(-1)
        try:
            if not own and func.namespace not in HOST:
                out = self.custom(func, args, kwargs)
            elif name in ("_to_copy", "copy_") and self.to_host(name, args, kwargs):
                return self.read_back(name, args, kwargs)
            else:
                with self.fake_mode:
                    out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            TRACE.event(f"{name}: value or shape read from the GPU")
            if name != "_local_scalar_dense" or TRACE.capturing:
                raise
            if host(args[0]) is not None:
                return host(args[0]).item()
            return {torch.bool: True}.get(args[0].dtype, 1)
        self.record(func, name, given, out)
        if func._schema.is_mutable:
            self.overwrite(func, name, args)
        elif own:
            self.follow(func, args, kwargs, given, out)
        return out

    @staticmethod
    def overwrite(func, name: str, args) -> None:
        """A number on the GPU that is written, whichever view of it is, is what is copied into it, or unknown."""
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and isinstance(x, FakeTensor)
                and x.untyped_storage().nbytes() == x.element_size()
            ):
                value = args[1] if name in ("copy_", "fill_") else None
                value = host(value) if isinstance(value, torch.Tensor) else value
                x.untyped_storage().number = None if value is None else float(value)

    def known(self, value: torch.Tensor) -> torch.Tensor:
        with self.fake_mode:
            out = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
        out._host = value, version(out)
        return out

    @staticmethod
    def follow(func, args, kwargs, given, out) -> None:
        """Small tensors that come from the host, and what is computed of them alone, keep their values beside them."""
        if torch.Tag.nondeterministic_seeded in func.tags or not isinstance(out, torch.Tensor):
            return
        name = func.overloadpacket.__name__
        if (
            out.device.type != "cuda"
            or out.numel() > SMALL
            or name.startswith(("empty", "new_empty"))
            or name == "empty_like"
        ):
            return
        values = [host(x) for x in given]
        if any(value is None for value in values):
            return
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        try:
            value = func(*tree_map_only(torch.Tensor, host, args), **tree_map_only(torch.Tensor, host, kwargs))
        except Exception:
            return
        if name in ("_to_copy", "clone") or not any(value is x for x in values):
            value = value.clone()
        out._host = value, version(out)

    def unmask(self, func, args):
        """A mask's length is a number that the host waits for; here all of it is true."""
        indices, found = [], False
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                found, mask = True, host(index)
                count = index.numel() if mask is None else int(mask.sum())
                with self.fake_mode:
                    index = torch.empty(count, dtype=torch.int64, device=args[0].device), index.dim()
                indices += [index[0]] * index[1]
            else:
                indices.append(index)
        if found and not (len(args) > 2 and args[2].numel() == 1):  # a scalar is filled in without
            TRACE.event(f"{func.overloadpacket.__name__} with a mask: shape read from the GPU")
        return (args[0], indices, *args[2:])

    @staticmethod
    def to_host(name: str, args, kwargs) -> bool:
        if name == "copy_":
            return args[0].device.type == "cpu" and args[1].device.type == "cuda"
        return args[0].device.type == "cuda" and torch.device(kwargs.get("device") or "cuda").type == "cpu"

    @staticmethod
    def read_back(name: str, args, kwargs):
        """What the host reads of the GPU is one everywhere: a token, a count, true."""
        TRACE.event(
            f"copy GPU to CPU {list(args[0].shape)}"
            + ("" if kwargs.get("non_blocking") or args[2:3] == (True,) else ", waits")
        )
        TRACE.launch("memcpy", "D2H", shapes(args[:1]))
        value = host(args[1] if name == "copy_" else args[0])
        if name == "copy_":
            return args[0].fill_(1) if value is None else args[0].copy_(value)
        if value is not None:
            return value.to(kwargs.get("dtype") or value.dtype, copy=True)
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

    def custom(self, func, args, kwargs):
        """C++ operators: ours if there is one, else its own fake, else nothing where it returns nothing."""
        fake = self.fakes.get(func.name()) or self.fakes.get(str(func))
        if fake is not None:
            with TRACE.silent(), self.fake_mode:
                return fake(*args, **kwargs)
        check_devices(func, args, kwargs)
        python = PYTHON.get(func.name())
        if python is not None:
            with self.again():
                return python(*args, **kwargs)
        if not func._schema.returns:
            return None
        with self.fake_mode:
            return func(*args, **kwargs)

    def record(self, func, name: str, given, out) -> None:
        outs = tensors(out)
        src = {x.device.type for x in given if x.numel() != 0}
        dst = {x.device.type for x in outs}
        if name in ("_to_copy", "copy_") and len(src | dst) == 2:
            TRACE.event(f"copy CPU to GPU {list(outs[0].shape)}")
            TRACE.launch("memcpy", "H2D", shapes(outs))
            return
        if dst == {"cpu"} or not (given or outs):
            return
        if func.name() in PYTHON and func.name() not in self.fakes:
            return
        if func.namespace not in ("aten", "prims", "prim"):
            TRACE.launch("custom", func.name(), shapes(given))
            return
        if name in NO_LAUNCH or func.is_view or all(x.numel() == 0 for x in outs):
            return
        TRACE.launch("copy" if name in COPIES else "op", name, shapes(given))


SMALL = 4096


def version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def host(x: torch.Tensor) -> torch.Tensor | None:
    """Return what is known of a tensor's values: those of a small one that is on the host or came from there."""
    if not isinstance(x, FakeTensor):
        return x if x.device.type == "cpu" and x.numel() <= SMALL else None
    written = vars(x.untyped_storage())
    if "number" in written:
        number = written["number"]
        return None if number is None else torch.full(x.shape, number, dtype=x.dtype)
    value, seen = getattr(x, "_host", (None, 0))
    return value if value is not None and version(x) == seen else None


def shapes(xs) -> str:
    return " ".join(f"{str(x.dtype)[6:]}{list(x.shape)}{'' if x.is_contiguous() else '*'}" for x in xs)


def check_devices(func, args, kwargs) -> None:
    """An operator for CUDA given a tensor of the CPU: on a GPU that is an illegal address."""
    bad = [x for x in tensors((args, kwargs)) if x.device.type != "cuda" and x.dim() > 0]
    if bad:
        TRACE.event(f"{func.name()} is given {len(bad)} CPU tensor(s): {shapes(bad)}")


_bases: dict[int, int] = {}
_top = 0x7F0000000000


def data_ptr(self: FakeTensor) -> int:
    """Answer as a caching allocator would: storages start at multiples of 512, views where their offset says."""
    global _top
    if self.numel() == 0:
        return 0
    storage = self.untyped_storage()
    if storage._cdata not in _bases:
        _bases[storage._cdata] = _top
        _top += -(-storage.nbytes() // 512) * 512
    return _bases[storage._cdata] + self.storage_offset() * self.element_size()
