"""Gated DeltaNet on vLLM's mamba-style state cache, with flat weights ``[q|k|v|z]`` and ``[b|a]`` (``weights.py``)."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

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


class GatedDeltaNet(nn.Module, MambaBase):
    """A Gated DeltaNet mixer that maps ``[num_tokens, hidden_size]`` to the same shape.

    vLLM's registered op splits the graph and calls ``_forward_core_fused_norm_packed`` with the outputs of the two
    input projections. The selected kernels do everything between these and ``out_proj``.
    """

    def __init__(
        self, config: QNextConfig, vllm_config: VllmConfig, quant_config: QuantizationConfig | None, prefix: str
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
            dims.head_v_dim,
            eps=config.rms_norm_eps,
            norm_before_gate=True,
            activation="silu",
            device=current_platform.current_device(),
        )
        self.out_proj = RowParallelLinear(
            dims.value_dim, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )

        self._state_shapes = state_shapes(dims, self.tp_size, vllm_config.num_speculative_tokens)
        self._state_dtypes = state_dtypes(vllm_config)
        self.kernels = select_kernels(self.dims, vllm_config)
        contexts = vllm_config.compilation_config.static_forward_context
        if prefix in contexts:
            raise ValueError(f"Duplicate layer name: {prefix}")
        contexts[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._state_shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._state_dtypes

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.kernels.prepare_weights(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
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

        ``mixed_qkvz`` is ``[num_tokens, conv_dim + value_dim]``, ``ba`` is ``[num_tokens, 2 * num_v_heads]`` and
        ``core_attn_out`` is ``[num_tokens, num_v_heads, head_v_dim]``. Rows after this step's tokens (graph padding)
        are set to zero because stale memory may hold NaN, and so are all rows of a profile run, which has no metadata.
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
        dims = self.dims
        qkv, z = mixed_qkvz[:n].split([dims.conv_dim, dims.value_dim], dim=-1)
        b, a = ba[:n].chunk(2, dim=-1)
        z = z.unflatten(-1, (dims.num_v_heads, dims.head_v_dim))
        self.kernels.run(self, metadata, qkv, z, b, a, core_attn_out[:n])
