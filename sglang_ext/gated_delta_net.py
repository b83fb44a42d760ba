"""Gated DeltaNet on SGLang's hybrid state pool, with flat weights ``[q|k|v|z]`` and ``[b|a]`` (``weights.py``)."""

from functools import partial

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import sharded_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix, is_cuda
from torch import nn

from qnext_plugin.checkpoint.layouts import section_sizes
from qnext_plugin.config import GatedDeltaNetDims, QNextConfig
from sglang_ext.compat import ON_CPU, reads_strided_gates
from sglang_ext.norm import RMSNormGated
from sglang_ext.streams import both, second_stream

OVERLAPPED_ROWS = 1023
"""With more rows SGLang's own model runs the input projections one after the other, because one fills the GPU."""


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


class GatedDeltaNet(nn.Module):
    """A Gated DeltaNet mixer that maps ``[num_tokens, hidden_size]`` to this rank's partial sum of the same shape."""

    def __init__(
        self, config: QNextConfig, layer_idx: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        parallel = get_parallel()
        tp_rank, tp_size = parallel.attn_tp_rank, parallel.attn_tp_size
        dims = config.gdn
        self.dims = dims.shard(tp_size)

        self.in_proj_qkvz = MergedColumnParallelLinear(
            config.hidden_size,
            list(section_sizes(dims, "qkvz")),
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj_qkvz", prefix),
            parallel_group="attn_tp",
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            config.hidden_size,
            list(section_sizes(dims, "ba")),
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj_ba", prefix),
            parallel_group="attn_tp",
        )
        self.conv1d = CausalConv1d(dims, tp_rank, tp_size)
        self.A_log = nn.Parameter(torch.empty(self.dims.num_v_heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(self.dims.num_v_heads), requires_grad=False)
        for param in (self.A_log, self.dt_bias):
            param.weight_loader = sharded_weight_loader(0, parallel_group="attn_tp")
        self.norm = RMSNormGated(dims.head_v_dim, eps=config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            dims.value_dim,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
            parallel_group="attn_tp",
        )
        self.stream = second_stream()
        self.unpacks_in_decode = is_cuda() and envs.SGLANG_ENABLE_GDN_DECODE_FUSED_PROJ_CONV.get()
        self.attn = RadixLinearAttention(
            layer_id=layer_idx,
            num_q_heads=self.dims.num_k_heads,
            num_k_heads=self.dims.num_k_heads,
            num_v_heads=self.dims.num_v_heads,
            head_q_dim=dims.head_k_dim,
            head_k_dim=dims.head_k_dim,
            head_v_dim=dims.head_v_dim,
            conv_weights=self.conv1d.weight.squeeze(1),
            activation="silu",
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        (qkvz, _), (ba, _) = both(
            self.stream if hidden_states.shape[0] <= OVERLAPPED_ROWS else None,
            partial(self.in_proj_qkvz, hidden_states),
            partial(self.in_proj_ba, hidden_states),
        )
        if self.unpacks_in_decode and forward_batch.forward_mode.is_decode():
            # One kernel unpacks both projections and convolves.
            out, z = self.attn(forward_batch, (qkvz, ba), ba, ba)
        else:
            qkv, z = qkvz.split([self.dims.conv_dim, self.dims.value_dim], dim=-1)
            b, a = ba.chunk(2, dim=-1)
            if not ON_CPU and not reads_strided_gates(forward_batch):
                b, a = ba.unflatten(-1, (2, -1)).transpose(0, 1).contiguous()  # one copy for both
            out = self.attn(forward_batch, qkv, a, b)
        heads = (-1, self.dims.num_v_heads, self.dims.head_v_dim)
        z, out = z.unflatten(-1, heads[1:]) if z.ndim == 2 else z, out.reshape(heads)
        if len(out) < len(z):  # attention data parallelism adds padding rows
            out = torch.cat([out, out.new_zeros(len(z) - len(out), *heads[1:])])
        return self.out_proj(self.norm(out, z).flatten(1))[0]
