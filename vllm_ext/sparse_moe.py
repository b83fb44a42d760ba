"""The feed-forward halves of a layer: the mixture of experts with a gated shared expert, and the dense MLP."""

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group, get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.utils import sequence_parallel_chunk
from vllm.platforms import current_platform

from qnext_plugin.config import QNextConfig
from vllm_ext.compat import experts_config


class MLP(nn.Module):
    """A SwiGLU layer whose output is scaled by ``sigmoid(gate(x))`` if a gate is given."""

    def __init__(
        self,
        config: QNextConfig,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        reduce_results: bool = True,
        disable_tp: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
            disable_tp=disable_tp,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            bias=False,
            reduce_results=reduce_results,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
            disable_tp=disable_tp,
        )
        self.act_fn = SiluAndMul()
        self._gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))
        return out if self._gate is None else torch.sigmoid(self._gate(x)) * out


class SparseMoeBlock(nn.Module):
    """The top-k experts by softmax plus one shared expert; maps ``[num_tokens, hidden_size]`` to the same shape.

    If ``scattered``, the tokens are only this rank's share.
    """

    def __init__(
        self,
        config: QNextConfig,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        scattered: bool = False,
    ) -> None:
        super().__init__()
        parallel = vllm_config.parallel_config
        self.is_sequence_parallel = parallel.use_sequence_parallel_moe
        self.splits_tokens = self.is_sequence_parallel and not scattered
        if get_tensor_model_parallel_world_size() > config.num_experts:
            raise ValueError(
                f"tensor parallel size {get_tensor_model_parallel_world_size()} exceeds num_experts "
                f"{config.num_experts}; use a smaller one"
            )
        self.n_routed_experts = self.n_logical_experts = config.num_experts
        self.n_redundant_experts = parallel.eplb_config.num_redundant_experts
        self.n_physical_experts = self.n_logical_experts + self.n_redundant_experts
        self.n_local_physical_experts = self.n_physical_experts // get_ep_group().device_group.size()

        # Rounded logits would choose other experts. GPUs have a product that returns float32 for bfloat16 weights only.
        on_cpu = current_platform.is_cpu()
        exact = on_cpu or (current_platform.is_cuda() and vllm_config.model_config.dtype == torch.bfloat16)
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            out_dtype=torch.float32 if exact else None,
            force_fp32_compute=on_cpu,
            prefix=f"{prefix}.gate",
        )
        self.shared_expert_gate = ReplicatedLinear(
            config.hidden_size, 1, bias=False, quant_config=None, prefix=f"{prefix}.shared_expert_gate"
        )
        self.shared_expert = MLP(
            config,
            config.shared_expert_intermediate_size,
            quant_config,
            prefix=f"{prefix}.shared_expert",
            # A lambda, not the module: the module belongs to this block, where a LoRA adapter may replace it.
            gate=lambda x: self.shared_expert_gate(x)[0],
            reduce_results=False,
            disable_tp=self.is_sequence_parallel,
        )
        with experts_config(vllm_config):
            self.experts = FusedMoEFactory(
                shared_experts=self.shared_expert,
                gate=self.gate,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                renormalize=config.norm_topk_prob,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
                enable_eplb=parallel.enable_eplb,
                num_redundant_experts=self.n_redundant_experts,
                is_sequence_parallel=self.is_sequence_parallel,
                router_logits_dtype=self.gate.out_dtype,
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        num_tokens = hidden_states.shape[0]
        if self.splits_tokens:
            hidden_states = sequence_parallel_chunk(hidden_states)
        # The runner applies the gate itself, so it takes the hidden states as ``router_logits``.
        out = self.experts(hidden_states=hidden_states, router_logits=hidden_states)
        if self.splits_tokens:
            out = tensor_model_parallel_all_gather(out, 0)[:num_tokens]
        return out
