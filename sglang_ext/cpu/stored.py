"""Quantized weights served in the checkpoint's codes by compiled products; SGLang's package has no such kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase
from sglang.srt.utils import set_weight_attrs
from torch import Tensor, nn

from qnext_plugin.checkpoint.layer_codes import OUTER, WEIGHT, Codes
from qnext_plugin.kernel_log import record
from qnext_plugin.ops.cpu import stored
from qnext_plugin.ops.cpu.operators import quantized_experts_operator, quantized_linear_operator


class Weight:
    """The parameters of a weight [rows, in], or of all experts' [experts, rows, in]; a prefix begins their names."""

    def __init__(self, layer: nn.Module, prefix: str, codes: Codes, sizes: tuple[int, ...], **attributes: Any) -> None:
        *experts, rows, inputs = sizes
        self.codes, self.rows, self.form = codes, rows, None
        self.params: dict[str, nn.Parameter] = {}
        for leaf, one in codes.zeros(rows, inputs).items():
            param = nn.Parameter(torch.zeros(*experts, *one.shape, dtype=one.dtype), requires_grad=False)
            # SGLang's loader of experts asks only tensors with scales in their names for this.
            of_rows = {"quant_method": "channel"} if leaf == OUTER else {"quant_method": "group", "input_dim": 1}
            set_weight_attrs(param, {"output_dim": 0} | of_rows | attributes)
            layer.register_parameter(prefix + leaf, param)
            self.params[leaf] = param

    def pack(self) -> None:
        """Replace the data of the first parameter by the packed weight, and that of the others by nothing."""
        form, packed = stored.pack(self.codes, {leaf: param.data for leaf, param in self.params.items()})
        self.form = list(form)
        for param in self.params.values():
            param.data = param.data.new_empty(0)
        self.params[WEIGHT].data = packed

    def unpack(self) -> None:
        """Undo ``pack``, to load some or all tensors again."""
        if self.form is not None:
            for leaf, tensor in stored.unpack(stored.Form(*self.form), self.params[WEIGHT].data, self.rows).items():
                self.params[leaf].data = tensor
            self.form = None


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
        sizes = (sum(output_partition_sizes), input_size_per_partition)
        self.weight = Weight(layer, "", self.codes[""], sizes, **extra_weight_attrs)
        self.weights = (self.weight,)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        record("products: stored")
        rows = self.weight.rows
        out = quantized_linear_operator(x.reshape(-1, x.shape[-1]), layer.weight, bias, self.weight.form, rows)
        return out.view(*x.shape[:-1], rows)


class StoredExpertsMethod(FusedMoEMethodBase):
    """The method of routed experts with SwiGLU; ``codes`` are by the beginning of the weights' names."""

    def __init__(self, codes: Mapping[str, Codes]) -> None:
        self.codes = codes

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Any,
        **_: Any,
    ) -> None:
        sizes = {"w13": (2 * intermediate_size_per_partition, hidden_size)}
        sizes["w2"] = (hidden_size, intermediate_size_per_partition)
        self.weights = tuple(
            Weight(layer, f"{name}_", self.codes[name], (num_experts, *size), weight_loader=weight_loader)
            for name, size in sizes.items()
        )

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """Do nothing: ``apply`` computes without a runner."""

    def apply(self, layer: Any, dispatch_output: StandardDispatchOutput) -> StandardCombineInput:
        record("experts: stored")
        topk_weights, topk_ids, _ = dispatch_output.topk_output
        forms = [weight.form for weight in self.weights]
        x, packed = dispatch_output.hidden_states, (layer.w13_weight, layer.w2_weight)
        return StandardCombineInput(
            hidden_states=quantized_experts_operator(x, *packed, topk_weights, topk_ids, *forms)
        )
