"""``torch.cuda`` of one GPU that is not there; streams, events and graphs are names."""

from types import SimpleNamespace

import torch

from tests.gpu.dry.trace import GPUS, TRACE


class Stream:
    def __init__(self, device=None, priority=0, stream_id=None, **_):
        Stream.count = getattr(Stream, "count", 0) + 1
        self.stream_id = Stream.count if stream_id is None else stream_id
        self.device, self.device_index, self.device_type = torch.device("cuda", 0), 0, 1
        self.cuda_stream, self.priority = self.stream_id, priority

    def wait_stream(self, other): ...
    def wait_event(self, event): ...
    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        TRACE.event("stream.synchronize")

    def query(self):
        return True

    def __enter__(self):
        self._was, TRACE.stream = TRACE.stream, self.stream_id
        return self

    def __exit__(self, *_):
        TRACE.stream = self._was

    def __eq__(self, other):
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self):
        return self.stream_id


class Event:
    def __init__(self, *_, **__):
        self.cuda_event = 0

    def record(self, stream=None): ...
    def wait(self, stream=None): ...
    def query(self):
        return True

    def synchronize(self):
        TRACE.event("event.synchronize")

    def elapsed_time(self, other):
        return 1.0

    def ipc_handle(self):
        return b""


class CUDAGraph:
    def __init__(self, *_, **__): ...
    def capture_begin(self, *_, **__):
        TRACE.capturing = True

    def capture_end(self):
        TRACE.capturing = False

    def replay(self):
        TRACE.launch("graph", "replay")

    def reset(self): ...
    def pool(self):
        return (0, 1)

    def instantiate(self): ...
    def enable_debug_mode(self): ...
    def debug_dump(self, *_): ...
    def raw_cuda_graph(self):
        return 0


class graph:
    def __init__(self, cuda_graph, pool=None, stream=None, **_):
        self.graph, self.stream = cuda_graph, stream or Stream(stream_id=7)

    def __enter__(self):
        self.stream.__enter__()
        self.graph.capture_begin()
        return self

    def __exit__(self, *_):
        self.graph.capture_end()
        self.stream.__exit__()


class on_stream:
    def __init__(self, stream=None) -> None:
        self.stream = stream

    def __enter__(self):
        self.was = TRACE.stream
        if self.stream is not None:
            TRACE.stream = self.stream.stream_id
        return self

    def __exit__(self, *_):
        TRACE.stream = self.was


class NoDevice:
    def __init__(self, *_, **__): ...
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def own(value):
    """A function of its own: torch.compile's tables want no function under two names."""
    return value if isinstance(value, type) else lambda *args, **kwargs: value(*args, **kwargs)


def patch_torch_cuda(capability: int) -> None:
    gpu_name, memory, sms, shared = GPUS[capability]
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name=gpu_name, major=major, minor=minor, total_memory=memory, multi_processor_count=sms, warp_size=32,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=shared, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, shared_memory_per_multiprocessor=shared + 1024, L2_cache_size=50 << 20,
        is_integrated=0, is_multi_gpu_board=0, uuid="GPU-00000000-0000-0000-0000-000000000000", gcnArchName="",
        max_threads_per_block=1024, pci_bus_id=0, pci_device_id=0, pci_domain_id=0, clock_rate=1, memory_clock_rate=1,
        memory_bus_width=5120,
    )  # fmt: skip
    cuda, C = torch.cuda, torch._C
    stats = dict.fromkeys(("allocated_bytes.all.current", "reserved_bytes.all.current", "active_bytes.all.current"), 0)
    nothing = lambda *_, **__: None  # noqa: E731
    streams = {"default": Stream(stream_id=0)}

    def current_stream(device=None):
        return streams["default"] if TRACE.stream == 0 else Stream(stream_id=TRACE.stream)

    def set_stream(stream):
        TRACE.stream = stream.stream_id

    values = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
        "is_initialized": lambda: True, "init": nothing, "_lazy_init": nothing, "_lazy_call": nothing,
        "get_device_capability": lambda device=None: (major, minor), "get_device_name": lambda device=None: gpu_name,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda d=None: TRACE.event("synchronize"),
        "mem_get_info": lambda device=None: (int(memory * 0.97), memory), "memory_allocated": lambda d=None: 0,
        "memory_reserved": lambda d=None: 0, "max_memory_allocated": lambda d=None: 0, "empty_cache": nothing,
        "max_memory_reserved": lambda d=None: 0, "reset_peak_memory_stats": nothing,
        "memory_stats": lambda d=None: dict(stats),
        "reset_max_memory_allocated": nothing, "ipc_collect": nothing, "utilization": lambda d=None: 0,
        "can_device_access_peer": lambda *_: True, "get_arch_list": lambda: ["sm_80", "sm_90", "sm_100"],
        "is_bf16_supported": lambda *_, **__: True, "manual_seed": nothing, "manual_seed_all": nothing, "seed": nothing,
        "Stream": Stream, "ExternalStream": Stream, "Event": Event, "current_stream": current_stream,
        "default_stream": lambda device=None: streams["default"], "set_stream": set_stream, "stream": on_stream,
        "StreamContext": on_stream, "device": NoDevice, "device_of": NoDevice, "_DeviceGuard": NoDevice,
        "CUDAGraph": CUDAGraph, "graph": graph, "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: TRACE.capturing, "get_rng_state": lambda d=None: torch.get_rng_state(),
        "set_rng_state": nothing,
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=nothing, cudaProfilerStop=nothing),
        "memory_snapshot": lambda *_: [], "_device_count_nvml": lambda: 1, "set_per_process_memory_fraction": nothing,
        "_get_device": lambda d: torch.device("cuda", 0), "_is_compiled": lambda: True, "MemPool": NoDevice,
        "use_mem_pool": NoDevice,
    }  # fmt: skip
    values = {key: own(value) for key, value in values.items()}
    for key, value in values.items():
        setattr(cuda, key, value)
    for module, keys in ((cuda.graphs, ("CUDAGraph", "graph", "graph_pool_handle", "is_current_stream_capturing")),
                         (cuda.streams, ("Stream", "Event", "ExternalStream")),
                         (cuda.memory, ("mem_get_info", "memory_allocated", "empty_cache", "memory_stats")),
                         ):  # fmt: skip
        for key in keys:
            setattr(module, key, values[key])
    cuda._initialized = True
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice", "setDevice", "synchronize", "init", "setStream"):
        setattr(C, f"_cuda_{name}", own(lambda *_: 0))
    cuda._exchange_device, cuda._maybe_exchange_device = C._cuda_exchangeDevice, C._cuda_maybeExchangeDevice
    C._cuda_getDeviceCount = lambda: 1
    C._cuda_getCurrentRawStream = lambda *_: TRACE.stream
    C._cuda_isCurrentStreamCapturing = lambda: TRACE.capturing
    C._cuda_getCurrentStream = lambda *_: (TRACE.stream, 0, 1)
    device = torch.device("cuda")
    for key, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device_index": lambda: 0,
        "current_device_idx": lambda: 0, "set_device_index": nothing,
        "synchronize": lambda d=None: TRACE.event("synchronize"),
        "current_accelerator": lambda check_available=False: device, "current_stream": current_stream,
        "set_stream": set_stream, "empty_cache": nothing, "memory_allocated": lambda d=None: 0,
        "memory_reserved": lambda d=None: 0, "max_memory_allocated": lambda d=None: 0,
        "get_memory_info": values["mem_get_info"], "memory_stats": values["memory_stats"],
        "max_memory_reserved": lambda d=None: 0, "reset_peak_memory_stats": nothing, "device_index": NoDevice,
    }.items():  # fmt: skip
        setattr(torch.accelerator, key, own(value))
    torch.get_device_module = lambda device=None: cuda
    torch.Generator, torch.Event = Generator, Event
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.Tensor.is_pinned = lambda self, device=None: True
    torch.Tensor.record_stream = own(nothing)
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, **_: self.to("cuda:0", non_blocking=non_blocking)
