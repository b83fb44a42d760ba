"""SGLang on any CPU: an out-of-tree platform, which needs nothing but SGLang's packages from PyPI."""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

ATTENTION_BACKEND = "qnext_cpu"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Out of tree because SGLang's own CPU platform imports kernels that are not on PyPI."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        @register_attention_backend(ATTENTION_BACKEND)
        def create(runner: Any) -> Any:
            from sglang_ext.cpu_attention import CpuAttentionBackend

            return CpuAttentionBackend(runner)
