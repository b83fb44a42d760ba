"""What only a GPU's layers do, as far as a CPU can show it; the kernels are in ``tests/gpu``."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.only("vllm")

HIDDEN, QKVZ, BA = 32, 48, 6


@pytest.fixture
def layer(monkeypatch):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_ext import gated_delta_net
    from vllm_ext.gated_delta_net import GatedDeltaNet

    monkeypatch.setattr(gated_delta_net, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
    method.apply = lambda layer, x: nn.functional.linear(x, layer.weight)
    made = GatedDeltaNet.__new__(GatedDeltaNet)
    nn.Module.__init__(made)
    for name, rows in (("in_proj_qkvz", QKVZ), ("in_proj_ba", BA)):
        weight = nn.Parameter(torch.randn(rows, HIDDEN), requires_grad=False)
        setattr(made, name, SimpleNamespace(weight=weight, quant_method=method))
    made.dims = SimpleNamespace(conv_dim=33, value_dim=15, num_v_heads=3, head_v_dim=5)
    made.kernels = SimpleNamespace(prepare_weights=lambda layer: None)
    return made


def config(lora=None, gb=0.0, group=0):
    offload = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=gb), prefetch=SimpleNamespace(offload_group_size=group)
    )
    return SimpleNamespace(lora_config=lora, offload_config=offload)


def test_one_product_computes_both_input_projections(layer):
    weights = [layer.in_proj_qkvz.weight, layer.in_proj_ba.weight]
    layer.joined = layer._join_inputs(config())
    assert layer.joined.weight.shape == (64, HIDDEN)  # a multiple of 16 rows
    for weight in weights:
        weight.data.copy_(torch.randn_like(weight))  # as a loader does, also while the model serves
    layer.process_weights_after_loading(torch.float32)
    x = torch.randn(5, HIDDEN)
    product = layer.in_proj_qkvz.quant_method.apply(layer.joined, x)
    qkvz, ba = (x @ weight.T for weight in weights)
    qkv, z, b, a = layer.split_inputs(product, product)
    torch.testing.assert_close(torch.cat([qkv, z.flatten(1)], dim=1), qkvz)
    torch.testing.assert_close(torch.cat([b, a], dim=1), ba)
    assert {each.untyped_storage().data_ptr() for each in (qkv, z, b, a)} == {product.untyped_storage().data_ptr()}


def test_weights_that_a_loader_replaces_are_multiplied_one_by_one(layer):
    layer.joined = layer._join_inputs(config())
    layer.in_proj_ba.weight.data = torch.randn(BA, HIDDEN)
    layer.process_weights_after_loading(torch.float32)
    assert layer.joined is None


@pytest.mark.parametrize("change", [{"lora": object()}, {"gb": 1.0}, {"group": 2}])
def test_where_weights_are_not_joined(layer, change):
    assert layer._join_inputs(config(**change)) is None


def test_quantized_weights_are_not_joined(layer):
    layer.in_proj_qkvz.quant_method = object()
    assert layer._join_inputs(config()) is None


def test_torch_compiles_the_joined_product_like_a_parameter(layer):
    layer.joined = layer._join_inputs(config())
    layer.forward = lambda x: nn.functional.linear(x, layer.joined.weight)
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(compiled(x), layer.forward(x))
    layer.in_proj_qkvz.weight.data.mul_(2)
    torch.testing.assert_close(compiled(x), layer.forward(x))


def test_a_norms_weight_of_one_head_is_loaded_for_each():
    from vllm_ext.gated_delta_net import load_repeated

    weight = nn.Parameter(torch.empty(12), requires_grad=False)
    load_repeated(weight, torch.arange(4.0))
    assert weight.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize(("asked", "raises"), [("cuda", True), ("triton", False), (None, False)])
def test_a_kernel_that_was_asked_for_and_cannot_serve_ends_the_start(monkeypatch, asked, raises):
    from vllm_ext.gpu_kernels import check_asked_kernel

    monkeypatch.delenv("VLLM_GDN_DECODE_KERNEL", raising=False)
    if asked:
        monkeypatch.setenv("VLLM_GDN_DECODE_KERNEL", asked)
    if raises:
        with pytest.raises(ValueError, match=r"VLLM_GDN_DECODE_KERNEL=cuda found.*heads of 128, not 64"):
            check_asked_kernel("it takes heads of 128, not 64", num_drafts=2)
    else:
        check_asked_kernel("it takes heads of 128, not 64", num_drafts=2)
    check_asked_kernel("it takes 1 to 7 drafts", num_drafts=0)
