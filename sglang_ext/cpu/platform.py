"""An out-of-tree platform that runs SGLang on any CPU and needs only SGLang's packages from PyPI."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from qnext_plugin.checkpoint.stored import read_served, refuse_quantizing

ATTENTION_BACKEND = "qnext_cpu"

# By default SGLang fills most of the memory with caches, and takes minutes at start to write zeros there.
MAX_RUNNING_REQUESTS = 32
STATES_PER_REQUEST = 6  # a running request takes up to five, including those that it can be resumed from
MAX_TOTAL_TOKENS = 262144

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU platform out of SGLang's tree, because SGLang's own one imports kernels that are not on PyPI."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set caches for a few users, unless the command line sets the memory to use, and cores for every rank.

        Also set LoRA without Triton, and our attention: for a CPU SGLang has already chosen one, without calling
        ``get_default_attention_backend``. Raise ``ValueError`` for a request to quantize weights while loading, and for
        a prefix cache with which SGLang would end.
        """
        check_quantization(server_args)
        check_prefix_cache(server_args)
        # The first is not on PyPI, and the second cannot verify drafts.
        if server_args.attention_backend in ("intel_amx", "torch_native"):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.lora_backend == "csgmv":  # SGLang's default, which needs Triton
            server_args.lora_backend = "torch_native"
        share_cores(server_args.tp_size * server_args.pp_size * server_args.dp_size)
        if server_args.mamba_radix_cache_strategy == "no_buffer":
            server_args.disable_overlap_schedule = True  # it cannot be overlapped
        if server_args.pp_size == 1:  # with more stages, the first may have to poll the others
            server_args.sleep_on_idle = True  # otherwise it polls for work all the time, which takes a core
        if server_args.mem_fraction_static is not None:
            return
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.max_mamba_cache_size is None:
            server_args.max_mamba_cache_size = STATES_PER_REQUEST * server_args.max_running_requests
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "EAGLE3", "STANDALONE")  # SGLang has renamed NEXTN to the first by then

    def get_speculative_cache_locs_fn(self) -> Any:
        from sglang_ext.cpu.speculation import assign_extend_cache_locs

        return assign_extend_cache_locs

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from sglang_ext.cpu.attention import CpuKVPool

        return CpuKVPool if kind == "mha" else None

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_quantization_config(self, quantization: str) -> Any:
        from sglang_ext.quantization import DequantizedConfig

        return DequantizedConfig

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        @register_attention_backend(ATTENTION_BACKEND)
        def create(runner: Any) -> Any:
            from sglang_ext.cpu.attention import CpuAttentionBackend

            keep_freed_memory()
            return CpuAttentionBackend(runner)


def check_quantization(server_args: Any) -> None:
    """Raise ``ValueError`` for ``--quantization`` with a checkpoint that is not quantized; nothing here could do it."""
    asked = server_args.quantization or server_args.speculative_draft_model_quantization
    if asked in (None, "unquant"):
        return
    checkpoint = read_served(
        server_args.model_path, server_args.revision, server_args.load_format, server_args.download_dir
    )
    if checkpoint.quantization is None:
        refuse_quantizing(asked)


def check_prefix_cache(server_args: Any) -> None:
    """Raise ``ValueError`` for flags of the prefix cache with which SGLang ends later, or at an assertion."""
    if server_args.enable_hierarchical_cache:
        raise ValueError(
            "--enable-hierarchical-cache found, expected none on a CPU: SGLang ends when it first writes to it; drop "
            "it, because the prefix cache is in the same memory"
        )
    if server_args.disable_radix_cache:
        return
    strategy = server_args.mamba_radix_cache_strategy
    if strategy == "extra_buffer_lazy" and (server_args.speculative_algorithm or server_args.disable_overlap_schedule):
        raise ValueError(
            f"--mamba-radix-cache-strategy {strategy} found, expected extra_buffer: it needs overlapped scheduling, "
            "which SGLang turns off for drafts on a CPU"
        )
    page, interval = server_args.page_size or 1, server_args.mamba_track_interval
    if strategy == "no_buffer":
        if page > 1:
            raise ValueError(
                f"--page-size {page} found with --mamba-radix-cache-strategy {strategy}, expected 1; drop one of both"
            )
        return
    drafts = server_args.speculative_num_draft_tokens or 1
    if interval % page or interval < drafts:
        raise ValueError(
            f"--mamba-track-interval {interval} found, expected a multiple of the page size {page}, and at least the "
            f"{drafts} draft tokens"
        )


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning large blocks to the kernel.

    Getting a page back from the kernel takes longer than most of what a layer does with it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(name, value)


def share_cores(ranks: int) -> None:
    """Bind each rank to separate cores where SGLang asks the user to: with more ranks than NUMA nodes."""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    if ranks > max(1, nodes):
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        shares = [",".join(cores[rank::ranks]) or cores[rank % len(cores)] for rank in range(ranks)]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(shares))
