"""Qwen3-Next for SGLang: the decoder layer, the trunk and the causal LM."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.aux_hidden_states import AuxHiddenStateList
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn, is_dense_ffn_fully_dp
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.pooler import Pooler, PoolingType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.runtime_context import get_exec, get_lora, get_model, get_parallel, get_spec
from sglang.srt.utils import LazyValue, add_prefix, make_pp_layers
from torch import nn
from transformers import PretrainedConfig

from qnext_plugin import __version__
from qnext_plugin.checkpoint.merged import MERGED, packed_modules
from qnext_plugin.config import FULL, QNextConfig
from sglang_ext import compat, guards
from sglang_ext.compat import ON_CPU
from sglang_ext.config import (
    captured_layers,
    check_dtype,
    check_grammars,
    check_packages,
    drafting,
    qnext_config,
)
from sglang_ext.gated_attention import GatedAttention
from sglang_ext.gated_delta_net import GatedDeltaNet
from sglang_ext.kernels import plain_weights, register_cpu_kernels
from sglang_ext.loading import Loading
from sglang_ext.lora import hidden_dim, prepare
from sglang_ext.norm import ZeroCenteredRMSNorm
from sglang_ext.quantization import being_loaded, layer_quantization, read_checkpoint, report
from sglang_ext.sparse_moe import MLP, SparseMoeBlock
from sglang_ext.weights import load_weights

logger = logging.getLogger(__name__)


def stages(config: QNextConfig, layer_idx: int) -> tuple[Any, Any]:
    """Declare what the two halves of a layer take and leave, so that SGLang can place communication between them."""
    following = min(layer_idx + 1, config.num_hidden_layers - 1)
    return declare_attn(), declare_ffn(
        sparse=config.is_sparse(layer_idx), next_layer_sparse=config.is_sparse(following)
    )


class DecoderLayer(nn.Module):
    def __init__(
        self, config: QNextConfig, layer_idx: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.full_attention = config.layer_types[layer_idx] == FULL
        if self.full_attention:
            self.self_attn = GatedAttention(config, layer_idx, quant_config, add_prefix("self_attn", prefix))
        else:
            self.linear_attn = GatedDeltaNet(config, layer_idx, quant_config, add_prefix("linear_attn", prefix))
        self.mlp = (
            SparseMoeBlock(config, layer_idx, quant_config, add_prefix("mlp", prefix))
            if config.is_sparse(layer_idx)
            else MLP(
                config,
                config.intermediate_size,
                quant_config,
                add_prefix("mlp", prefix),
                replicated=is_dense_ffn_fully_dp(),
            )
        )
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attn, ffn = stages(config, layer_idx)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (attn, self.input_layernorm), (ffn, self.post_attention_layernorm)
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        captured: AuxHiddenStateList | None = None,
    ) -> torch.Tensor:
        """Run the layer; the batch holds the residual stream, which ``captured`` receives as it enters this layer."""
        hidden_states = self.attn_boundary.prepare(hidden_states, forward_batch, capture_gathered=captured)
        if not forward_batch.forward_mode.is_idle() and hidden_states.shape[0]:
            if self.full_attention:
                hidden_states = self.self_attn(positions, hidden_states, forward_batch)
            else:
                hidden_states = self.linear_attn(hidden_states, forward_batch)
        hidden_states = self.attn_boundary.finish(hidden_states, forward_batch)
        hidden_states = self.ffn_boundary.prepare(hidden_states, forward_batch)
        if isinstance(self.mlp, SparseMoeBlock):
            hidden_states = self.mlp(hidden_states, forward_batch)
        else:
            hidden_states = self.mlp(hidden_states)
        return self.ffn_boundary.finish(hidden_states, forward_batch)


class Qwen3NextModel(nn.Module):
    def __init__(self, config: QNextConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.pp_group = get_parallel().pp_group
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, use_attn_tp_group=is_dp_attention_enabled())
            if self.pp_group.is_first_rank
            else PPMissingLayer()
        )
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            config.num_hidden_layers,
            lambda idx, prefix: DecoderLayer(config, idx, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
            stage_facts=lambda idx: stages(config, idx),
        )
        self.norm = (
            ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if self.pp_group.is_last_rank
            else PPMissingLayer(return_tuple=True)
        )
        self.layers_to_capture: frozenset[int] = frozenset()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> tuple[torch.Tensor | PPProxyTensors, AuxHiddenStateList]:
        if self.pp_group.is_first_rank:
            if input_embeds is None:
                hidden_states = self.embed_tokens(input_ids)
            else:
                hidden_states = input_embeds.to(self.embed_tokens.weight.dtype)  # SGLang makes them bfloat16
            residual_batch.start(forward_batch)
        else:
            first = self.layers[self.start_layer]
            hidden_states = first.attn_boundary.from_pp(pp_proxy_tensors, forward_batch)
        aux_hidden_states = AuxHiddenStateList()
        for idx in range(self.start_layer, self.end_layer):
            with get_global_expert_distribution_recorder().with_current_layer(idx):
                captured = aux_hidden_states if idx in self.layers_to_capture else None
                hidden_states = self.layers[idx](positions, hidden_states, forward_batch, captured)
        if not self.pp_group.is_last_rank:
            return residual_batch.to_pp(hidden_states, forward_batch), aux_hidden_states
        return residual_batch.final_norm(hidden_states, forward_batch, self.norm, skip_empty=True), aux_hidden_states


class Qwen3NextForCausalLM(nn.Module):
    fall_back_to_pt_during_load = False
    packed_modules_mapping = packed_modules(grouped=False)

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        compat.check_platform()
        check_dtype(torch.get_default_dtype())
        self.config = config
        self.checkpoint = read_checkpoint()
        self.qnext_config = self.checkpoint.complete(qnext_config(config, get_parallel().attn_tp_size))
        drafts = drafting(get_spec(), get_model(), self.checkpoint, self.qnext_config, get_parallel().pp_size)
        check_grammars(get_exec().kernel.grammar_backend, drafts)
        mamba = get_exec().mamba
        asked = check_packages(mamba.linear_attn_prefill_backend, mamba.enable_mamba_extra_buffer)
        adapters = get_lora().enable_lora
        compat.apply(compat.Uses(model=True, drafts=drafts, adapters=adapters, packages=asked))
        register_cpu_kernels()
        guards.vocab_size = self.qnext_config.vocab_size
        self.loading = Loading(
            self, self.qnext_config, self.checkpoint, role="trunk", drafts_required=drafts == "NEXTN"
        )
        if quant_config is not None:
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.quant_config = quant_config
        quant_config = layer_quantization(self.checkpoint, self.qnext_config, quant_config)
        self.pp_group = get_parallel().pp_group
        self.model = Qwen3NextModel(self.qnext_config, quant_config, add_prefix("model", prefix))
        if not self.pp_group.is_last_rank:
            self.lm_head = PPMissingLayer()
        elif self.qnext_config.tie_word_embeddings and self.pp_group.is_first_rank:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                self.qnext_config.vocab_size,
                self.qnext_config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
                use_attn_tp_group=get_parallel().enable_dp_lm_head,
            )
        self.logits_processor = LogitsProcessor(config)
        self.pooler = Pooler(pooling_type=PoolingType.LAST, normalize=True)
        self.routed_experts_weights = LazyValue(
            lambda: {
                idx: self.model.layers[idx].mlp.expert_weights()
                for idx in range(self.start_layer, self.end_layer)
                if isinstance(self.model.layers[idx].mlp, SparseMoeBlock)
            }
        )
        report(self, self.checkpoint, draft=False)
        logger.info("qnext-plugin %s: Qwen3NextForCausalLM is served by %s", __version__, type(self).__module__)

    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
        return self.routed_experts_weights.value

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
        get_embedding: bool = False,
    ) -> Any:
        hidden_states, aux_hidden_states = self.model(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors
        )
        if not self.pp_group.is_last_rank:
            return hidden_states
        if get_embedding:  # --is-embedding
            return self.pooler(hidden_states, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch, aux_hidden_states or None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.checkpoint = being_loaded(self.checkpoint)

        def copy(checked: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            with plain_weights(self):
                return load_weights(self, self.qnext_config, self.checkpoint, checked, complete=self.loading.is_first)

        return self.loading.load(weights, copy)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return both weights, None for a head without ``weight``; SGLang also shares the head module itself."""
        return self.model.embed_tokens.weight, getattr(self.lm_head, "weight", None)

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Set the ``layer_ids`` whose output an EAGLE3 draft reads; we capture it as the input of the next layer."""
        self.model.layers_to_capture = frozenset(captured_layers(self.qnext_config, layer_ids))

    def prepare_adapter(self, adapter: LoRAAdapter, tensors: dict[str, torch.Tensor]) -> None:
        """Prepare a LoRA adapter from the tensors that SGLang has read; called before the adapter is used."""
        prepare(self.qnext_config, self, adapter, tensors)

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        return hidden_dim(self.qnext_config, module_name, layer_idx, get_parallel().tp_size)

    def get_stacked_multiply(self, module_name: str) -> int:
        """Return how many ``lora_A`` SGLang keeps for one of our modules."""
        merged = MERGED.get(module_name.removesuffix("_moe"))
        return 1 if merged is None else merged.num_sections

    def should_apply_lora(self, module_name: str) -> bool:
        """Return False for routed experts on a CPU, because SGLang has only Triton kernels for them."""
        return not (ON_CPU and module_name.endswith(".mlp.experts"))

    @classmethod
    def get_model_config_for_expert_location(cls, config: PretrainedConfig) -> ModelConfigForExpertLocation:
        return ModelConfigForExpertLocation(
            num_layers=config.num_hidden_layers, num_logical_experts=config.num_experts, num_groups=None
        )
