"""The feed-forward halves of a layer: the mixture of experts with a gated shared expert, and the dense MLP.

Both return this rank's share of the output (a partial sum), which the layer's boundary completes.
"""

from functools import partial

import torch
from sglang.kernels.ops.elementwise.elementwise import fused_gate_sigmoid_mul_add
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import (
    RoutingMethodType,
    filter_moe_weight_param_global_expert,
    is_deepep_class_backend,
    is_moe_input_scattered_across_dp_ranks,
)
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import add_prefix, is_cuda
from torch import nn

from qnext_plugin.config import QNextConfig
from sglang_ext.compat import bind_topk, pages_experts, route
from sglang_ext.config import check_exchange
from sglang_ext.quantization import experts_quantization
from sglang_ext.streams import both, second_stream


class MLP(nn.Module):
    """A SwiGLU, ``replicated`` on every rank or split over them; keeps the shape ``[num_tokens, hidden_size]``."""

    def __init__(
        self,
        config: QNextConfig,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        replicated: bool,
    ) -> None:
        super().__init__()
        parallel_group = "replicated" if replicated else "tp"
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
            parallel_group=parallel_group,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
            parallel_group=parallel_group,
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class SparseMoeBlock(nn.Module):
    """The top-k experts by softmax plus one shared expert; maps ``[num_tokens, hidden_size]`` to the same shape."""

    def __init__(
        self, config: QNextConfig, layer_idx: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        check_exchange(get_moe_a2a_backend().value)
        self.is_draft = prefix.startswith("mtp.")
        tp_size = get_parallel().tp_size
        if tp_size > config.num_experts:
            raise ValueError(
                f"tensor parallel size {tp_size} exceeds num_experts {config.num_experts}; use a smaller one"
            )
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, quant_config=None, prefix=add_prefix("gate", prefix)
        )
        self.topk = TopK(top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob, layer_id=layer_idx)
        self.experts = get_moe_impl_class(quant_config)(
            layer_id=layer_idx,
            top_k=config.num_experts_per_tok,
            # The load balancer has no spare experts in a draft.
            num_experts=config.num_experts + (0 if self.is_draft else get_exec().moe.ep_num_redundant_experts),
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            routing_method_type=(
                RoutingMethodType.RenormalizeNaive if config.norm_topk_prob else RoutingMethodType.Default
            ),
            # The shared expert's gate reads the input afterwards.
            inplace=False,
            quant_config=experts_quantization(quant_config, add_prefix("experts", prefix)),
            prefix=add_prefix("experts", prefix),
        )
        bind_topk(self.topk, self.experts)
        # Where each rank routes its own tokens, the shared expert's output is complete, not a partial sum.
        self.shared_expert = MLP(
            config,
            config.shared_expert_intermediate_size,
            quant_config,
            prefix=add_prefix("shared_expert", prefix),
            replicated=is_moe_input_scattered_across_dp_ranks(),
        )
        self.shared_expert_gate = ReplicatedLinear(
            config.hidden_size, 1, bias=False, quant_config=None, prefix=add_prefix("shared_expert_gate", prefix)
        )
        # Exchanging tokens and fetching experts is for the main stream.
        self.stream = None if is_deepep_class_backend() or pages_experts() else second_stream()

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        if hidden_states.shape[0] == 0:  # an idle rank still takes part in the exchange of tokens
            return self.experts(hidden_states, self.topk.empty_topk_output(hidden_states.device))
        shared, out = both(
            self.stream,
            partial(self.shared_expert, hidden_states),
            partial(self._routed, hidden_states, forward_batch),
        )
        # The kernel takes only the weight, without what a LoRA adapter adds to it.
        if is_cuda() and isinstance(self.shared_expert_gate, ReplicatedLinear):
            fused_gate_sigmoid_mul_add(hidden_states, self.shared_expert_gate.weight.squeeze(0), shared, out)
            return out
        return out + torch.sigmoid(self.shared_expert_gate(hidden_states)[0]) * shared

    def _routed(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states, route(self.topk, hidden_states, router_logits, forward_batch, self.is_draft))

    def expert_weights(self) -> list[torch.Tensor]:
        """Return the weights that SGLang's expert-parallel load balancer moves between ranks."""
        return [
            param.data
            for name, param in self.experts.named_parameters()
            if filter_moe_weight_param_global_expert(name, param, self.experts.num_local_experts)
        ]
