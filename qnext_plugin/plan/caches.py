"""Compute how each engine divides the memory left for its caches, and how many sequences fit.

The formulas and their names are those of vLLM 0.32 and SGLang 0.5.23. All sizes are in bytes on one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any

import torch

from qnext_plugin.checkpoint.cache_scales import asks_for_fp8_cache
from qnext_plugin.plan.sizes import Serving


@dataclass(frozen=True)
class Device:
    """The block sizes of vLLM's attention on a kind of device, in tokens.

    ``alignment`` is the smallest block that the kernels accept, ``block_size`` is vLLM's default before it aligns.
    ``checkpoints`` is the number of tokens at whose multiples the kernel for prompts can keep states, or None.
    """

    alignment: int
    block_size: int
    checkpoints: int | None = None


DEVICES = {"cuda": Device(16, 16, 64), "cpu": Device(32, 128)}
"""``cuda`` is a Hopper or Blackwell GPU with vLLM 0.33; vLLM 0.32 and older GPUs keep no states inside a prompt."""


def default_state_dtype(engine: str, device: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of recurrent states that an engine chooses if no flag sets it.

    ``config`` is the content of ``config.json``, ``dtype`` the dtype in which the model is served. For the device
    ``cpu`` the answer is for this machine's CPU.
    """
    if engine == "vllm":
        return torch.float32 if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else dtype
    return torch.float32 if (named := config.get("mamba_ssm_dtype")) is None else getattr(torch, named)


def default_cache_dtype(engine: str, device: str, quantization: Mapping[str, Any] | None) -> torch.dtype | None:
    """Return the dtype of keys and values that an engine chooses if no flag sets it; None for that of the model.

    ``quantization`` is the checkpoint's description of its quantization. For the device ``cpu`` the answer is for this
    machine's CPU: vLLM needs instructions for FP8 there, and our adapter for SGLang chooses it only by a flag.
    """
    if not asks_for_fp8_cache(quantization):
        return None
    if device == "cpu" and (engine == "sglang" or not torch.cpu._is_avx512_supported()):
        return None
    return torch.float8_e4m3fn


@dataclass(frozen=True)
class VllmCache:
    """vLLM's cache, in which states and keys with values are in pages of one size.

    vLLM lengthens the attention block until its page holds a state. Layers are in groups of equal size; a block is one
    page in each layer of a group. For each group of Gated DeltaNet layers a sequence takes one state block, one more
    with prefix caching (mode ``align``), another for a state inside a prompt, and one for each draft. For each group of
    attention layers it takes as many blocks as its tokens fill.
    """

    serving: Serving
    state_dtype: torch.dtype
    device: Device = DEVICES["cuda"]
    prefix_caching: bool = True
    user_block_size: int | None = None

    @property
    def state_bytes(self) -> int:
        """The bytes of one layer's state, whose convolution window has columns for the drafts."""
        drafts = self.serving.num_draft_tokens
        return self.serving.state(self.serving.dtype, self.state_dtype, drafts).page_bytes

    @property
    def checkpoints(self) -> int | None:
        """The number of tokens at whose multiples states inside a prompt are kept, or None."""
        dims, dtype = self.serving.config.gdn, self.serving.dtype
        served = self.prefix_caching and dims.head_k_dim == dims.head_v_dim == 128 and dtype != torch.float32
        return self.device.checkpoints if served else None

    @property
    def block_size(self) -> int:
        """The tokens in an attention block; without ``--prefix-match-unit``, prefixes are found in whole blocks."""
        asked = self.user_block_size or self.device.block_size
        if not self.serving.num_gdn_layers:
            return asked
        alignment = lcm(max(self.device.alignment, asked), self.checkpoints or 1)
        block = alignment * ceil(self.state_bytes / (alignment * self.serving.kv_bytes_per_layer))
        return max(asked, ceil(block / self.device.alignment) * self.device.alignment)

    @property
    def prefix_match_unit(self) -> int:
        """The value of ``--prefix-match-unit``, in tokens, that finds most of a prefix; it divides every block size."""
        return self.device.alignment

    @property
    def layers_per_group(self) -> int:
        counts = sorted(filter(None, (self.serving.num_full_attention_layers, self.serving.num_gdn_layers)))
        # If both kinds have nearly as many layers, vLLM pads a few layers instead of making many small groups.
        return counts[-1] if counts[-1] < 1.5 * counts[0] else counts[0]

    @property
    def block_bytes(self) -> int:
        return self.layers_per_group * self.block_size * self.serving.kv_bytes_per_layer

    @property
    def state_blocks(self) -> int:
        """The number of state blocks of one sequence."""
        groups = ceil(self.serving.num_gdn_layers / self.layers_per_group)
        kept = self.prefix_caching + (self.checkpoints is not None)
        return groups * (1 + kept + self.serving.num_draft_tokens)

    def blocks(self, num_tokens: int) -> int:
        """Return the number of all blocks of one sequence of ``num_tokens`` tokens."""
        groups = ceil(self.serving.num_full_attention_layers / self.layers_per_group)
        return self.state_blocks + groups * ceil(num_tokens / self.block_size)

    def num_blocks(self, memory: int) -> int:
        """Return how many blocks ``memory`` holds.

        vLLM refuses a larger ``--max-num-seqs`` when it captures CUDA graphs.
        """
        return max(0, memory) // self.block_bytes

    def concurrency(self, memory: int, num_tokens: int) -> float:
        return self.num_blocks(memory) / self.blocks(num_tokens)

    def longest(self, memory: int) -> int:
        """Return the tokens of the longest sequence that fits alone."""
        groups = ceil(self.serving.num_full_attention_layers / self.layers_per_group)
        return max(0, (self.num_blocks(memory) - self.state_blocks) // groups) * self.block_size


@dataclass(frozen=True)
class SglangCache:
    """SGLang's cache: a pool of state slots and a pool of tokens, in the ratio ``mamba_full_memory_ratio``.

    A running sequence takes 1 slot. With prefix caching it takes 5: 3, and 2 more with overlapping scheduling
    (``extra_buffer``). While drafting it also takes a state for each draft and for the token before the drafts.
    """

    serving: Serving
    state_dtype: torch.dtype
    prefix_caching: bool = True
    ratio: float = 0.9
    max_running_requests: int | None = None

    @property
    def state_bytes(self) -> int:
        """The bytes of one slot, which holds all layers' states of one sequence."""
        return self.serving.state(self.serving.dtype, self.state_dtype).page_bytes * self.serving.num_gdn_layers

    @property
    def slots_per_request(self) -> int:
        return 5 if self.prefix_caching else 1

    @property
    def verified_tokens(self) -> int:
        drafts = self.serving.num_draft_tokens
        return drafts + 1 if drafts else 0

    def num_slots(self, memory: int) -> int:
        budget = memory * self.ratio / (1 + self.ratio)
        if self.serving.num_draft_tokens:
            verified = self.verified_tokens
            left = budget - self.state_bytes * (1 + verified)
            return max(0, int(left // (self.state_bytes * (1 + verified / self.slots_per_request))))
        return max(0, int((budget - self.state_bytes) // self.state_bytes))

    def running_requests(self, memory: int) -> int:
        """Return the largest number of requests that run at once, however short they are."""
        # Without --max-running-requests SGLang allows 48 while drafting, and otherwise so many that states limit them.
        asked = self.max_running_requests or (48 if self.serving.num_draft_tokens else 4096)
        return min(asked, self.num_slots(memory) // self.slots_per_request, self.num_tokens(memory) // 2)

    def num_tokens(self, memory: int) -> int:
        """Return how many tokens all sequences together can have."""
        asked = self.max_running_requests or 48
        slots = self.num_slots(memory)
        verifying = (min(asked, slots // self.slots_per_request) + 1) * self.verified_tokens
        return max(0, int(memory - (slots + 1 + verifying) * self.state_bytes)) // self.serving.kv_bytes_per_token

    def concurrency(self, memory: int, num_tokens: int) -> float:
        """Return how many sequences of ``num_tokens`` tokens fit; below 1 not even one fits."""
        fitting = self.num_tokens(memory) / num_tokens
        return min(float(self.running_requests(memory)), fitting)
