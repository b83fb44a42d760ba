"""Gated DeltaNet on vLLM's mamba-style state cache, with flat weights ``[q|k|v|z]`` and ``[b|a]`` (``weights.py``)."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from qnext_plugin.checkpoint.layouts import section_sizes
from qnext_plugin.config import GatedDeltaNetDims, QNextConfig
from vllm_ext.kernels import select_kernels
from vllm_ext.state import state_dtypes, state_shapes


class CausalConv1d(nn.Module):
    """The depthwise convolution's weight for this rank's ``[q|k|v]`` channels: ``[conv_dim, 1, width]``."""

    def __init__(self, dims: GatedDeltaNetDims, tp_rank: int, tp_size: int) -> None:
        super().__init__()
        local = dims.shard(tp_size)
        self.weight = nn.Parameter(torch.empty(local.conv_dim, 1, dims.conv_kernel_size), requires_grad=False)

        def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
            sections = loaded.split([dims.key_dim, dims.key_dim, dims.value_dim])
            param.data.copy_(torch.cat([section.chunk(tp_size)[tp_rank] for section in sections]))

        self.weight.weight_loader = load


def load_repeated(param: nn.Parameter, loaded: torch.Tensor) -> None:
    """Load a norm's weight of one head for each head: a kernel that takes all heads of a token needs no copy of z."""
    param.data.copy_(loaded.repeat(len(param) // len(loaded)))


class GatedDeltaNet(nn.Module, MambaBase):
    """A Gated DeltaNet mixer that maps ``[num_tokens, hidden_size]`` to the same shape.

    vLLM's registered op splits the graph and calls ``_forward_core_fused_norm_packed`` with the outputs of the two
    input projections. The selected kernels do everything between these and ``out_proj``.
    """

    def __init__(
        self,
        config: QNextConfig,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.tp_size = get_tensor_model_parallel_world_size()
        tp_rank = get_tensor_model_parallel_rank()
        dims = config.gdn
        self.dims = dims.shard(self.tp_size)
        # vLLM's kernel warm-up recognizes a Gated DeltaNet layer by these names.
        self.num_k_heads, self.num_v_heads = dims.num_k_heads, dims.num_v_heads
        self.head_k_dim, self.head_v_dim = dims.head_k_dim, dims.head_v_dim
        self.conv_kernel_size = dims.conv_kernel_size

        self.in_proj_qkvz = MergedColumnParallelLinear(
            config.hidden_size,
            list(section_sizes(dims, "qkvz")),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_qkvz",
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            config.hidden_size,
            list(section_sizes(dims, "ba")),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_ba",
        )
        self.conv1d = CausalConv1d(dims, tp_rank, self.tp_size)
        self.A_log = nn.Parameter(torch.empty(self.dims.num_v_heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(self.dims.num_v_heads), requires_grad=False)
        for param in (self.A_log, self.dt_bias):
            param.weight_loader = sharded_weight_loader(0)
        self.norm = RMSNormGated(
            self.dims.value_dim,
            eps=config.rms_norm_eps,
            group_size=dims.head_v_dim,
            norm_before_gate=True,
            activation="silu",
            device=current_platform.current_device(),
        )
        self.norm.weight.weight_loader = load_repeated
        self.out_proj = RowParallelLinear(
            dims.value_dim,
            config.hidden_size,
            bias=False,
            reduce_results=reduce_results,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )

        self.joined = self._join_inputs(vllm_config)
        self._state_shapes = state_shapes(dims, self.tp_size, vllm_config.num_speculative_tokens)
        self._state_dtypes = state_dtypes(vllm_config)
        self.kernels = select_kernels(self.dims, vllm_config)
        contexts = vllm_config.compilation_config.static_forward_context
        if prefix in contexts:
            raise ValueError(f"Duplicate layer name: {prefix}")
        contexts[prefix] = self

    def _join_inputs(self, vllm_config: VllmConfig) -> SimpleNamespace | None:
        """Make the weights of both input projections views of one, so that one product computes both, if possible.

        Return what holds the joined weight. It has a multiple of 16 rows, so that kernels load rows of the product as
        wide as they can. Loading, also of a live model, copies into the views.
        """
        projections, offload = (self.in_proj_qkvz, self.in_proj_ba), vllm_config.offload_config
        if (
            not current_platform.is_cuda()
            or any(type(projection.quant_method) is not UnquantizedLinearMethod for projection in projections)
            or vllm_config.lora_config is not None
            or offload.uva.cpu_offload_gb
            or offload.prefetch.offload_group_size
        ):
            return None
        weights = [projection.weight for projection in projections]
        sizes = [len(weight) for weight in weights]
        joined = weights[0].data.new_zeros(round_up(sum(sizes), 16), weights[0].shape[1])
        for weight, view in zip(weights, joined[: sum(sizes)].split(sizes), strict=True):
            weight.data = view
        return SimpleNamespace(weight=joined)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._state_dtypes

    def get_prefill_checkpoint_alignment(self) -> int | None:
        return self.kernels.checkpoint_alignment

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Return the cache's layout, with a block for a state in the middle of a prompt if our kernel returns them."""
        spec, grid = super().get_kv_cache_spec(vllm_config), self.kernels.checkpoint_grid
        if spec is None or grid is None:
            return spec
        return replace(spec, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=grid)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        weights = (self.in_proj_qkvz.weight, self.in_proj_ba.weight) if self.joined is not None else ()
        if any(not _is_inside(weight, self.joined.weight) for weight in weights):  # the loader has replaced them
            self.joined = None
        self.kernels.prepare_weights(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.joined is not None:
            mixed_qkvz = ba = self.in_proj_qkvz.quant_method.apply(self.joined, hidden_states)
        else:
            mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
            ba, _ = self.in_proj_ba(hidden_states)
        out = torch.empty(
            (hidden_states.shape[0], self.dims.num_v_heads, self.dims.head_v_dim),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
        )
        torch.ops.vllm.qwen_gdn_attention_core_fused_norm_packed(
            mixed_qkvz, ba, out, layer_name=_encode_layer_name(self.prefix)
        )
        return self.out_proj(out.flatten(-2))[0]

    def _forward_core_fused_norm_packed(
        self, mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor
    ) -> None:
        """Compute convolution, delta rule and gated norm of this step's tokens and write them to ``core_attn_out``.

        ``mixed_qkvz`` is ``[num_tokens, conv_dim + value_dim]`` and ``ba`` is ``[num_tokens, 2 * num_v_heads]``, or
        each is the product of both projections. ``core_attn_out`` is ``[num_tokens, num_v_heads, head_v_dim]``. Rows
        after this step's tokens (graph padding) are set to zero because stale memory may hold NaN, and so are all rows
        of a profile run, which has no metadata.
        """
        by_layer = get_forward_context().attn_metadata
        metadata = by_layer.get(self.prefix) if isinstance(by_layer, dict) else None
        if metadata is None:
            core_attn_out.zero_()
            self.kernels.warm_up(self, mixed_qkvz, ba)
            return
        assert isinstance(metadata, GDNAttentionMetadata)
        n = metadata.num_actual_tokens
        core_attn_out[n:].zero_()
        if n == 0:
            return
        self.kernels.run(self, metadata, *self.split_inputs(mixed_qkvz[:n], ba[:n]), core_attn_out[:n])

    def split_inputs(
        self, mixed_qkvz: torch.Tensor, ba: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return qkv ``[num_tokens, conv_dim]``, z ``[num_tokens, num_v_heads, head_v_dim]``, b and a, all views."""
        dims = self.dims
        width = dims.conv_dim + dims.value_dim
        if self.joined is not None:
            ba = mixed_qkvz[:, width : width + 2 * dims.num_v_heads]
        qkv, z = mixed_qkvz[:, :width].split([dims.conv_dim, dims.value_dim], dim=-1)
        b, a = ba.chunk(2, dim=-1)
        return qkv, z.unflatten(-1, (dims.num_v_heads, dims.head_v_dim)), b, a


def _is_inside(view: torch.Tensor, whole: torch.Tensor) -> bool:
    return view.device == whole.device and whole.data_ptr() <= view.data_ptr() < whole.data_ptr() + whole.nbytes
