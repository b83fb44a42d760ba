"""Qwen3-Next for vLLM: the decoder layer, the trunk and the causal LM."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_reduce_scatter,
)
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    HasInnerState,
    IsHybrid,
    MixtureOfExperts,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    sequence_parallel_chunk,
)
from vllm.sequence import IntermediateTensors

from qnext_plugin import __version__
from qnext_plugin.checkpoint.merged import packed_modules
from qnext_plugin.config import FULL, QNextConfig
from vllm_ext import compat
from vllm_ext.config import check_runner, check_speculation, qnext_config, scatters_tokens
from vllm_ext.gated_attention import GatedAttention
from vllm_ext.gated_delta_net import GatedDeltaNet
from vllm_ext.kernels import choose_gemms, register_cpu_kernels
from vllm_ext.loading import Loading
from vllm_ext.lora import prepare
from vllm_ext.norm import ZeroCenteredRMSNorm
from vllm_ext.quantization import layer_quantization, read_checkpoint, report
from vllm_ext.sparse_moe import MLP, SparseMoeBlock
from vllm_ext.state import state_dtypes, state_shapes
from vllm_ext.weights import load_weights

# A logger in vLLM's tree uses the handlers and the level that the user has set for vLLM.
logger = init_logger("vllm.qnext_plugin")


def gather_tokens(hidden_states: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return all ``num_tokens`` tokens from each rank's share of them."""
    return tensor_model_parallel_all_gather(hidden_states, 0)[:num_tokens]


def reduce_scatter_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the sum over the ranks for this rank's share of the tokens, padded to a multiple of the ranks."""
    missing = -hidden_states.shape[0] % get_tensor_model_parallel_world_size()
    return tensor_model_parallel_reduce_scatter(nn.functional.pad(hidden_states, (0, 0, 0, missing)), 0)


class DecoderLayer(nn.Module):
    """A decoder layer. If ``scattered``, its inputs and outputs are each rank's share of the tokens."""

    def __init__(
        self,
        config: QNextConfig,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        full_attention: bool,
        sparse: bool,
    ) -> None:
        super().__init__()
        self.full_attention, self.scattered = full_attention, scatters_tokens(config, vllm_config)
        reduce = not self.scattered
        if self.full_attention:
            name = f"{prefix}.self_attn"
            self.self_attn = GatedAttention(config, vllm_config, quant_config, name, reduce_results=reduce)
        else:
            name = f"{prefix}.linear_attn"
            self.linear_attn = GatedDeltaNet(config, vllm_config, quant_config, name, reduce_results=reduce)
        self.mlp = (
            SparseMoeBlock(config, vllm_config, quant_config, f"{prefix}.mlp", scattered=self.scattered)
            if sparse
            else MLP(config, config.intermediate_size, quant_config, prefix=f"{prefix}.mlp")
        )
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        if self.scattered:
            hidden_states = gather_tokens(hidden_states, positions.shape[-1])
        if self.full_attention:
            hidden_states = self.self_attn(positions, hidden_states)
        else:
            hidden_states = self.linear_attn(hidden_states)
        if self.scattered:
            hidden_states = reduce_scatter_tokens(hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class Qwen3NextModel(nn.Module, EagleModelMixin):
    def __init__(self, *, vllm_config: VllmConfig, quant_config: QuantizationConfig | None, prefix: str = "") -> None:
        super().__init__()
        config = qnext_config(vllm_config)
        self.scattered = scatters_tokens(config, vllm_config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

        def make_layer(prefix: str) -> DecoderLayer:
            idx = extract_layer_index(prefix)
            full_attention, sparse = config.layer_types[idx] == FULL, config.is_sparse(idx)
            return DecoderLayer(config, vllm_config, quant_config, prefix, full_attention=full_attention, sparse=sparse)

        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            make_layer,
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            ZeroCenteredRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if get_pp_group().is_last_rank
            else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        if self.scattered:
            hidden_states = sequence_parallel_chunk(hidden_states)
        aux_hidden_states = self._maybe_add_hidden_state([], self.start_layer, hidden_states, residual)
        for idx, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(aux_hidden_states, idx + 1, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        if self.scattered:
            wanted = [hidden_states, *aux_hidden_states]
            gathered = gather_tokens(torch.cat(wanted, dim=-1), positions.shape[-1])
            hidden_states, *aux_hidden_states = gathered.chunk(len(wanted), dim=-1)
        return (hidden_states, aux_hidden_states) if aux_hidden_states else hidden_states


class ExpertBookkeeping(MixtureOfExperts):
    """The attributes that vLLM's expert-parallel load balancer reads and updates."""

    def describe_experts(self, layers: Iterable[nn.Module]) -> None:
        blocks = [layer.mlp for layer in layers if isinstance(getattr(layer, "mlp", None), SparseMoeBlock)]
        self.moe_layers = [block.experts for block in blocks]
        self.num_moe_layers = len(blocks)
        self.num_expert_groups, self.num_shared_experts = 1, 0
        for name in ("logical_experts", "physical_experts", "local_physical_experts", "routed_experts"):
            setattr(self, f"num_{name}", getattr(blocks[0], f"n_{name}") if blocks else 0)
        self.num_redundant_experts = self.num_physical_experts - self.num_logical_experts

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        assert self.num_local_physical_experts == num_local_physical_experts
        self.num_physical_experts = num_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for experts in self.moe_layers:
            experts.update_expert_map()


class Qwen3NextForCausalLM(
    nn.Module, HasInnerState, IsHybrid, ExpertBookkeeping, SupportsEagle3, SupportsLoRA, SupportsPP
):
    packed_modules_mapping = packed_modules(grouped=True)
    lora_skip_prefixes = ["mtp."]  # noqa: RUF012  the draft is served without adapters

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_runner(vllm_config)
        check_speculation(vllm_config)
        compat.apply(vllm_config)
        register_cpu_kernels(vllm_config)
        self.config = vllm_config.model_config.hf_text_config  # vLLM's pooling and LoRA classes read it
        checkpoint = read_checkpoint(vllm_config)
        self.qnext_config = config = checkpoint.complete(qnext_config(vllm_config))
        self._loading = Loading(self, config, vllm_config, checkpoint, role="trunk")
        self.vllm_config, self.quant_config = vllm_config, vllm_config.quant_config
        quant_config = layer_quantization(checkpoint, config, vllm_config)
        self.model = Qwen3NextModel(
            vllm_config=vllm_config, quant_config=quant_config, prefix=maybe_prefix(prefix, "model")
        )
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.describe_experts(self.model.layers)
        choose_gemms(self, config, vllm_config)
        report(self, checkpoint, draft=False)
        logger.info("qnext-plugin %s: Qwen3NextForCausalLM is served by %s", __version__, __name__)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return self._loading.is_unused(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def copy(checked: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            return load_weights(self, self.qnext_config, self.vllm_config, self._loading.checkpoint, checked)

        return self._loading.load(weights, copy)

    def prepare_adapter(self, adapter: LoRAModel) -> None:
        """Prepare a LoRA adapter that vLLM has read; ``lora.load_adapter`` calls this before the adapter is used."""
        prepare(self, self.lora_manager, self.qnext_config, adapter)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(
            qnext_config(vllm_config).gdn,
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()
