"""Quantized weights served in the checkpoint's codes by compiled products; vLLM has such kernels for few formats."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from qnext_plugin.checkpoint.layer_codes import OUTER, WEIGHT, Codes
from qnext_plugin.kernel_log import record
from qnext_plugin.ops.cpu import stored
from qnext_plugin.ops.cpu.operators import quantized_experts_operator, quantized_linear_operator


def register(layer: nn.Module, prefix: str, tensors: Mapping[str, Tensor], **attributes: Any) -> None:
    """Register ``tensors``, by the last segment of their names, as parameters that vLLM loads; rows come first.

    For experts the dimension of experts comes before that of rows.
    """
    for leaf, tensor in tensors.items():
        param = nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(prefix + leaf, param)
        # vLLM's loader of experts asks only tensors with scales in their names for this.
        of_rows = {"quant_method": "channel"} if leaf == OUTER else {"quant_method": "group", "input_dim": 1}
        set_weight_attrs(param, {"output_dim": 0} | of_rows | attributes)


def pack(layer: nn.Module, prefix: str, codes: Codes) -> list[int]:
    """Replace the parameters of ``register`` by the packed weight, ``{prefix}weight``; return its form."""
    names = codes.zeros(0, 0)
    form, packed = stored.pack(codes, {leaf: getattr(layer, prefix + leaf).data for leaf in names})
    replace_parameter(layer, prefix + WEIGHT, packed)
    for leaf in names.keys() - {WEIGHT}:
        delattr(layer, prefix + leaf)
    return list(form)


class StoredLinearMethod(LinearMethodBase):
    """The method of a linear layer or head whose weight is served as ``codes[""]``."""

    def __init__(self, codes: Mapping[str, Codes]) -> None:
        self.codes = codes

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.rows = sum(output_partition_sizes)
        register(layer, "", self.codes[""].zeros(self.rows, input_size_per_partition), **extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.form = pack(layer, "", self.codes[""])
        record("products: stored")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = quantized_linear_operator(x.reshape(-1, x.shape[-1]), layer.weight, bias, self.form, self.rows)
        return out.view(*x.shape[:-1], self.rows)


class StoredExpertsMethod(FusedMoEMethodBase):
    """The method of routed experts with SwiGLU; ``codes`` are by the beginning of the weights' names."""

    def __init__(self, moe: Any, codes: Mapping[str, Codes]) -> None:
        super().__init__(moe)
        self.codes = codes

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = {"w13": (2 * intermediate_size_per_partition, hidden_size)}
        sizes["w2"] = (hidden_size, intermediate_size_per_partition)
        for name, (rows, inputs) in sizes.items():
            one = self.codes[name].zeros(rows, inputs)
            tensors = {leaf: torch.zeros(num_experts, *t.shape, dtype=t.dtype) for leaf, t in one.items()}
            register(layer, f"{name}_", tensors, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.forms = [pack(layer, f"{name}_", self.codes[name]) for name in ("w13", "w2")]
        record("experts: stored")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        return quantized_experts_operator(x, layer.w13_weight, layer.w2_weight, topk_weights, ids, *self.forms)
