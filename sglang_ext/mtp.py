"""The multi-token-prediction draft: a full-attention layer that reads the next token and the trunk's hidden state."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_lora, get_parallel, get_server_args
from sglang.srt.utils import add_prefix
from torch import nn
from transformers import PretrainedConfig

from qnext_plugin import __version__
from qnext_plugin.checkpoint.merged import packed_modules
from qnext_plugin.config import QNextConfig
from sglang_ext import compat
from sglang_ext.config import draft_config, qnext_config
from sglang_ext.kernels import plain_weights
from sglang_ext.loading import Loading, pattern_of
from sglang_ext.model import Qwen3NextModel
from sglang_ext.norm import ZeroCenteredRMSNorm
from sglang_ext.quantization import (
    being_loaded,
    layer_quantization,
    quantization_of_projection,
    read_checkpoint,
    report,
)
from sglang_ext.weights import load_draft_weights

logger = logging.getLogger(__name__)


class MultiTokenPredictor(Qwen3NextModel):
    """The draft's layers: ``fc([norm(embedding of the next token) | norm(hidden)])``, a decoder layer and ``norm``.

    ``hidden`` ``[num_tokens, hidden_size]`` comes from the trunk's final norm or, in later draft steps, from this
    module. It runs only on the last pipeline stage, so it always starts from embeddings.
    """

    def __init__(
        self,
        config: QNextConfig,
        quant_config: QuantizationConfig | None,
        fc_quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__(draft_config(config), quant_config, prefix)
        self.pre_fc_norm_embedding = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=fc_quant_config,
            prefix=add_prefix("fc", prefix),
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: None = None,
    ) -> Any:
        embeddings = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        hidden_states = forward_batch.spec_info.hidden_states
        x = embeddings
        if len(embeddings):  # an idle rank has no rows, which not every kernel takes
            embeddings = self.pre_fc_norm_embedding(embeddings)
            hidden_states = self.pre_fc_norm_hidden(hidden_states)
            x, _ = self.fc(torch.cat([embeddings, hidden_states], dim=-1))
        # The load balancer would otherwise take this layer for the trunk's first one.
        with get_global_expert_distribution_recorder().disable_this_region():
            return super().forward(input_ids, positions, forward_batch, x)


class Qwen3NextForCausalLMMTP(nn.Module):
    fall_back_to_pt_during_load = False
    packed_modules_mapping = packed_modules(grouped=False)

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        compat.apply(compat.Uses(model=True, drafts="NEXTN", adapters=get_lora().enable_lora))
        self.config = config
        self.checkpoint = read_checkpoint()
        self.qnext_config = self.checkpoint.complete(qnext_config(config, get_parallel().attn_tp_size))
        if quant_config is not None:
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.quant_config = quant_config  # SGLang reads the type of the key-value cache from it
        self.loading = Loading(self, self.qnext_config, self.checkpoint, role="draft", drafts_required=True)
        # SGLang takes it for the first load, and would read all files of the checkpoint once more.
        self.allow_patterns_overrides = pattern_of(self.checkpoint, "mtp.") if self.loading.is_first else None
        quant_config = layer_quantization(self.checkpoint, self.qnext_config.draft, quant_config)
        fc_quant_config = quantization_of_projection(self.checkpoint, quant_config)
        self.model = MultiTokenPredictor(self.qnext_config, quant_config, fc_quant_config, add_prefix("mtp", prefix))
        self.lm_head = ParallelLMHead(
            self.qnext_config.vocab_size,
            self.qnext_config.hidden_size,
            prefix=add_prefix("lm_head", prefix),
            use_attn_tp_group=get_parallel().enable_dp_lm_head,
        )
        # Both weights become the trunk's: without any here, the caches get their memory. Where the trunk is a pipeline,
        # of which a draft is told nothing else, SGLang loads the embedding for it.
        self.lm_head.register_parameter("weight", None)
        if resolution_result(get_server_args(), "pp_size") == 1:
            self.model.embed_tokens.register_parameter("weight", None)
        self.logits_processor = LogitsProcessor(config)
        report(self, self.checkpoint, draft=True)
        logger.info("qnext-plugin %s: Qwen3NextForCausalLMMTP is served by %s", __version__, type(self).__module__)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        hidden_states, _ = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.checkpoint = being_loaded(self.checkpoint)
        self.allow_patterns_overrides = None  # new weights may be in other files

        def copy(checked: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            with plain_weights(self.model):
                return load_draft_weights(
                    self, self.qnext_config, self.checkpoint, checked, complete=self.loading.is_first
                )

        return self.loading.load(weights, copy)

    def get_embed_and_head(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor | None) -> None:
        """Share the trunk's weights; with pipelines SGLang has read ``embed`` from the checkpoint for the draft."""
        for module, weight in ((self.model.embed_tokens, embed), (self.lm_head, head)):
            if weight is not None:
                del module.weight  # the new one need not be a parameter
                module.weight = weight

    def set_lm_head_from_target(self, target_lm_head: nn.Module) -> None:
        """Share the trunk's head module itself, which may hold its weight in another form."""
        self.lm_head = target_lm_head
