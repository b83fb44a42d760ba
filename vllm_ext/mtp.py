"""The multi-token-prediction draft: a full-attention layer that reads the next token and the trunk's hidden state."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix, sequence_parallel_chunk

from qnext_plugin import __version__
from qnext_plugin.checkpoint.merged import packed_modules
from qnext_plugin.config import QNextConfig
from vllm_ext import compat
from vllm_ext.config import qnext_config
from vllm_ext.kernels import choose_draft_head, choose_gemms
from vllm_ext.loading import Loading
from vllm_ext.model import DecoderLayer, ExpertBookkeeping, gather_tokens
from vllm_ext.norm import ZeroCenteredRMSNorm
from vllm_ext.quantization import layer_quantization, read_checkpoint, report
from vllm_ext.weights import load_draft_weights

logger = init_logger("vllm.qnext_plugin")


@support_torch_compile
class MultiTokenPredictor(nn.Module):
    """The draft's layers: ``fc([norm(embedding of the next token) | norm(hidden)])``, a decoder layer and ``norm``.

    ``hidden_states`` ``[num_tokens, hidden_size]`` come from the trunk's final norm or, in later draft steps, from this
    module. It runs only on the last pipeline stage, so it always starts from embeddings.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        config: QNextConfig,
        quant_config: QuantizationConfig | None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, hidden_size)
        self.pre_fc_norm_embedding = ZeroCenteredRMSNorm(hidden_size, eps=eps)
        self.pre_fc_norm_hidden = ZeroCenteredRMSNorm(hidden_size, eps=eps)
        self.fc = ColumnParallelLinear(
            2 * hidden_size,
            hidden_size,
            gather_output=True,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.fc",
        )
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                vllm_config,
                quant_config,
                f"{prefix}.layers.{i}",
                full_attention=True,
                sparse=config.num_experts > 0,
            )
            for i in range(config.num_nextn_predict_layers)
        )
        self.norm = ZeroCenteredRMSNorm(hidden_size, eps=eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden_states)], dim=-1)
        layer, x = self.layers[spec_step_idx % len(self.layers)], self.fc(x)
        x, residual = layer(positions, sequence_parallel_chunk(x) if layer.scattered else x, None)
        x, _ = self.norm(x, residual)
        return gather_tokens(x, positions.shape[-1]) if layer.scattered else x


class Qwen3NextMTP(nn.Module, ExpertBookkeeping):
    packed_modules_mapping = packed_modules(grouped=False)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        compat.apply(vllm_config)
        checkpoint = read_checkpoint(vllm_config)
        self.config = checkpoint.complete(qnext_config(vllm_config))
        self._loading = Loading(self, self.config, vllm_config, checkpoint, role="draft")
        self.vllm_config, self.quant_config = vllm_config, vllm_config.quant_config
        quant_config = layer_quantization(checkpoint, self.config.draft, vllm_config)
        self.model = MultiTokenPredictor(
            vllm_config=vllm_config,
            config=self.config.draft,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "mtp"),
        )
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.describe_experts(self.model.layers)
        choose_gemms(self.model, self.config, vllm_config)
        if choose_draft_head(self.lm_head, self.config, vllm_config):
            self.has_own_lm_head = True  # otherwise vLLM replaces it by the target's
        report(self, checkpoint, draft=True)
        logger.info("qnext-plugin %s: Qwen3NextMTP is served by %s", __version__, type(self).__module__)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
        **kwargs: object,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, hidden_states, inputs_embeds, spec_step_idx)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the most likely ids; ranks exchange one logit each instead of those of the whole vocabulary."""
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return self._loading.is_unused(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def copy(checked: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            return load_draft_weights(self, self.config, self.vllm_config, self._loading.checkpoint, checked)

        return self._loading.load(weights, copy)
