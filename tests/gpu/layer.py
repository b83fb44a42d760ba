"""A Gated DeltaNet layer outside an engine: vLLM's metadata and cache layout, our kernels, and the float64 oracle.

A ``Layer`` holds requests that grow step by step. Each ``step`` builds the batch's metadata with vLLM's own builder,
runs the layer on it, and holds the outputs and the states left in the cache against the oracle, which recomputes every
request from its first token.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata, GDNAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import MambaSpec

from qnext_plugin.config import GatedDeltaNetDims
from qnext_plugin.reference import formulas
from tests.gpu.turns import Request, Turn
from tests.support.tolerances import LAYER, assert_close
from vllm_ext.gated_delta_net import GatedDeltaNet
from vllm_ext.gpu_kernels import GpuKernels
from vllm_ext.placeholders import build_metadata
from vllm_ext.state import state_dtypes, state_shapes

PREFIX = "model.layers.0.linear_attn"
EPS = 1e-6


@dataclass
class Layer:
    """One layer's weights, cache and requests. ``num_drafts`` is what the engine speculates, 0 for not at all.

    ``full_graph`` makes the builder pad batches as it does for full CUDA graphs. ``backend`` is vLLM's
    ``gdn_prefill_backend``.
    """

    dims: GatedDeltaNetDims
    dtype: torch.dtype
    state_dtype: str = "float32"
    num_drafts: int = 0
    full_graph: bool = False
    backend: str = "triton"
    num_slots: int = 64
    device: str = "cpu"
    seed: int = 0
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        dims = self.dims
        speculative = SimpleNamespace(
            num_speculative_tokens=self.num_drafts, parallel_drafting=False, use_eagle_block_drop=lambda: False
        )
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(
                cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: self.full_graph),
                max_cudagraph_capture_size=None,
                custom_ops=["all"],
                enabled_custom_ops=set(),
                disabled_custom_ops=set(),
            ),
            model_config=SimpleNamespace(
                dtype=self.dtype,
                hf_text_config=SimpleNamespace(
                    linear_key_head_dim=dims.head_k_dim, linear_value_head_dim=dims.head_v_dim
                ),
            ),
            cache_config=SimpleNamespace(
                mamba_cache_mode="none", mamba_cache_dtype="auto", mamba_ssm_cache_dtype=self.state_dtype
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=2048),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative if self.num_drafts else None,
            num_speculative_tokens=self.num_drafts,
            additional_config={"gdn_prefill_backend": self.backend},
            use_v2_model_runner=False,
        )
        self.layer = self._layer()
        self.config.compilation_config.static_forward_context = {PREFIX: self.layer}
        spec = MambaSpec(
            block_size=16,
            shapes=self.layer.get_state_shape(),
            dtypes=self.layer.get_state_dtype(),
            num_speculative_blocks=self.num_drafts,
        )
        with self.context():
            self.builder = GDNAttentionMetadataBuilder(spec, [PREFIX], self.config, torch.device(self.device))
        self.free = (1 + torch.randperm(self.num_slots - 1, generator=self.generator)).tolist()

    @contextlib.contextmanager
    def context(self, metadata: GDNAttentionMetadata | None = None) -> Iterator[None]:
        forward = SimpleNamespace(attn_metadata=None if metadata is None else {PREFIX: metadata})
        with set_current_vllm_config(self.config), override_forward_context(forward):
            yield

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _layer(self) -> GatedDeltaNet:
        """The real class without its projections, which need an engine."""
        dims = self.dims
        layer = GatedDeltaNet.__new__(GatedDeltaNet)
        nn.Module.__init__(layer)
        layer.prefix, layer.dims, layer.tp_size = PREFIX, dims, 1
        layer.num_k_heads, layer.num_v_heads = dims.num_k_heads, dims.num_v_heads
        layer.head_k_dim, layer.head_v_dim = dims.head_k_dim, dims.head_v_dim
        layer.conv_kernel_size = dims.conv_kernel_size
        layer.conv1d = SimpleNamespace(weight=self._weight(0.4 * self.random(dims.conv_dim, 1, dims.conv_kernel_size)))
        layer.A_log = self._weight(self.random(dims.num_v_heads), torch.float32)
        layer.dt_bias = self._weight(self.random(dims.num_v_heads))
        layer.joined = None
        layer.norm = SimpleNamespace(
            weight=self._weight((1 + 0.2 * self.random(dims.head_v_dim)).repeat(dims.num_v_heads)),
            eps=EPS,
            activation="silu",
        )
        layer._state_shapes = state_shapes(dims, 1, self.num_drafts)
        layer._state_dtypes = state_dtypes(self.config)
        layer.kv_cache = self._cache(layer)
        with self.context():
            layer.kernels = GpuKernels(dims, self.config)
        return layer

    def _weight(self, value: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
        return nn.Parameter(value.to(self.device, dtype or self.dtype), requires_grad=False)

    def _cache(self, layer: GatedDeltaNet) -> list[Tensor]:
        """As vLLM lays it out: both states of a slot in one page with room to spare, so that slots are strided."""
        shapes, dtypes = layer.get_state_shape(), layer.get_state_dtype()
        sizes = [torch.Size(s).numel() * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
        sizes = [-(-size // 128) * 128 for size in sizes]
        page = sum(sizes) + 256
        raw = torch.full((self.num_slots * page,), 0xFF, dtype=torch.uint8, device=self.device)  # NaN in every dtype
        states, offset = [], 0
        for shape, dtype, size in zip(shapes, dtypes, sizes, strict=True):
            strides = (page // dtype.itemsize, *torch.empty(shape).stride())
            states.append(raw.view(dtype).as_strided((self.num_slots, *shape), strides, offset // dtype.itemsize))
            offset += size
        assert all(state.isnan().all() for state in states)
        return states

    def request(self) -> Request:
        slots = torch.tensor([self.free.pop() for _ in range(1 + self.num_drafts)], dtype=torch.int32)
        dims = self.dims
        width = dims.conv_dim + dims.value_dim + 2 * dims.num_v_heads
        return Request(slots, torch.empty(0, width, dtype=self.dtype))

    def release(self, request: Request) -> None:
        self.free.extend(request.slots.tolist())

    def metadata(self, turns: Sequence[Turn], padded: int = 0) -> GDNAttentionMetadata:
        """As vLLM's runner asks for it; ``padded`` more requests without tokens follow the real ones."""
        lengths = torch.tensor([turn.length for turn in turns] + [0] * padded)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        computed = torch.tensor([len(turn.request.tokens) for turn in turns] + [0] * padded)
        prompt = [turn.drafts is None and (turn.num_tokens > 1 or len(turn.request.tokens) == 0) for turn in turns]
        # The runner's block table is wider than the columns in use.
        table = torch.zeros(len(lengths), 1 + self.num_drafts + 3, dtype=torch.int32)
        for i, turn in enumerate(turns):
            table[i, : 1 + self.num_drafts] = turn.request.slots
        num_tokens = int(starts[-1])
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=(computed + lengths).int().to(self.device),
            num_reqs=len(lengths),
            num_actual_tokens=num_tokens + padded * (1 + self.num_drafts),
            max_query_len=int(lengths.max()),
            max_seq_len=int((computed + lengths).max()),
            block_table_tensor=table.to(self.device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            is_prefilling=torch.tensor([*prompt, *[False] * padded]),
            seq_lens_cpu_upper_bound=(computed + lengths).int(),
        )
        more = {}
        if self.num_drafts:
            accepted = [turn.request.accepted for turn in turns] + [1] * padded
            drafts = [-1 if turn.drafts is None else turn.drafts for turn in turns] + [-1] * padded
            more = {
                "num_accepted_tokens": torch.tensor(accepted, dtype=torch.int32, device=self.device),
                "num_decode_draft_tokens_cpu": torch.tensor(drafts, dtype=torch.int32),
            }
        with torch.inference_mode():
            return build_metadata(GDNAttentionMetadataBuilder.build, self.builder, 0, common, **more)

    def step(self, turns: Sequence[Turn], padded: int = 0) -> float:
        """Run one batch and compare it with the oracle; return the largest relative error."""
        dims, tolerance = self.dims, LAYER[self.dtype]
        metadata = self.metadata(turns, padded)
        width = dims.conv_dim + dims.value_dim + 2 * dims.num_v_heads
        # Shifted, so that q and k are not orthogonal: the gated norm would blow up the rounding of almost nothing.
        rows = [(self.random(turn.length, width) + 0.5).to(self.dtype) for turn in turns]
        extra = padded * (1 + self.num_drafts) + 3  # piecewise graphs add rows past the metadata's
        inputs = torch.cat([*rows, torch.zeros(extra, width, dtype=self.dtype)]).to(self.device)
        mixed_qkvz, ba = inputs.split([dims.conv_dim + dims.value_dim, 2 * dims.num_v_heads], dim=-1)
        out = torch.full((len(inputs), dims.num_v_heads, dims.head_v_dim), float("nan"), dtype=self.dtype)
        out = out.to(self.device)
        with self.context(metadata), torch.inference_mode(), poisoned_memory():
            # The engine's projections are tensors of their own, which kernels may write to.
            self.layer._forward_core_fused_norm_packed(mixed_qkvz.contiguous(), ba.contiguous(), out)
        out = out.cpu()
        worst, begin = 0.0, 0
        for i, (turn, new) in enumerate(zip(turns, rows, strict=True)):
            what = f"request {i} of {len(turns)} ({turn.length} tokens after {len(turn.request.tokens)})"
            expected, states = self.oracle(torch.cat([turn.request.tokens, new]), turn.length)
            worst = max(worst, _error(out[begin : begin + turn.length], expected, tolerance, what))
            stays = turn.length if turn.drafts is None else turn.accepted
            request = turn.request
            request.tokens = torch.cat([request.tokens, new[:stays]])
            request.accepted = 1 if turn.drafts is None else stays
            column = 0 if turn.drafts is None else stays - 1
            state = self.layer.kv_cache[1][int(request.slots[column])].cpu().mT
            worst = max(worst, _error(state, states[stays - 1], tolerance, f"{what}, state"))
            begin += turn.length
        assert out[begin:].isfinite().all(), "rows of padding are not finite"
        return worst

    def oracle(self, tokens: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Outputs [last, Hv, V] of a sequence's last tokens and the states [last, Hv, K, V] after each, float64."""
        dims, layer = self.dims, self.layer

        def double(x: Tensor) -> Tensor:
            return x.detach().to(self.device).double()

        qkv, z, b, a = double(tokens).split([dims.conv_dim, dims.value_dim, dims.num_v_heads, dims.num_v_heads], -1)
        start = qkv.new_zeros(dims.conv_dim, dims.conv_kernel_size - 1)
        mixed, _ = formulas.causal_conv1d(qkv, double(layer.conv1d.weight).squeeze(1), start)
        q, k, v = mixed.split([dims.key_dim, dims.key_dim, dims.value_dim], -1)
        q, k = (x.unflatten(-1, (dims.num_k_heads, dims.head_k_dim)) for x in (q, k))
        v, z = (x.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)) for x in (v, z))
        g, beta = formulas.gating(a, b, double(layer.A_log), double(layer.dt_bias))
        state = v.new_zeros(dims.num_v_heads, dims.head_k_dim, dims.head_v_dim)
        out, states = formulas.gated_delta_rule(q, k, v, g, beta, state)
        out = formulas.rms_norm_gated(out, z, double(layer.norm.weight)[: dims.head_v_dim], EPS)
        return out[-last:].cpu(), states[-last:].cpu()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, those that kernels allocate for themselves too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _error(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    assert_close(actual, expected, tolerance, what)
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
