"""What SGLang makes of an adapter's tensors before it serves them; no engine is started."""

import pytest
import torch

from qnext_plugin.checkpoint.layouts import ungroup
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.config import QNextConfig
from tests.support.adapters import PREFIX, WEIGHTS, write_adapter

RANK = 3
SIZES = {"num_hidden_layers": 4, "num_experts": 3, "linear_num_key_heads": 3, "linear_num_value_heads": 9}
LINEAR, ATTENTION = "model.layers.0.linear_attn", "model.layers.3.self_attn"
LINEARS = r"(model|mtp)\.layers\.\d+\.(linear_attn|self_attn|mlp|mlp\.shared_expert)\.\w+"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows") / "base"
    write_random_checkpoint(directory, dtype="float32", overrides=SIZES)
    return directory


@pytest.fixture
def stacked(tmp_path, model):
    """What SGLang has of an adapter with ``modules``, and the adapter's own tensors."""
    from safetensors.torch import load_file
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    from sglang_ext.compat import Uses, apply
    from sglang_ext.lora import prepare

    class Base(torch.nn.Module):
        config = QNextConfig.from_pretrained(model)

        def prepare_adapter(self, adapter, tensors):
            prepare(self.config, self, adapter, tensors)

    apply(Uses(adapters=True))

    def of(modules, **config):
        directory = write_adapter(tmp_path / "adapter", model, modules, RANK, 2, **config)
        adapter = LoRAAdapter("a", LoRAConfig(str(directory)), Base.config, LoadConfig(), None, Base())
        tensors = load_file(directory / WEIGHTS)
        adapter.initialize_weights_from_tensors(tensors)
        return {name: t for layer in adapter.layers for name, t in layer.weights.items()}, tensors

    return of


def name(module, part):
    return f"{PREFIX}{module}.lora_{part}.weight"


def test_rows_are_flat_and_the_draft_is_left_out(stacked, model):
    found, stored = stacked(LINEARS)
    dims = QNextConfig.from_pretrained(model).gdn
    for kind, copies in (("qkvz", 4), ("ba", 2)):
        module = f"{LINEAR}.in_proj_{kind}"
        assert torch.equal(found[name(module, "B")], ungroup(stored[name(module, "B")], dims, kind, "lora_B.weight"))
        assert torch.equal(found[name(module, "A")], stored[name(module, "A")].repeat(copies, 1))
    assert torch.equal(found[name(f"{LINEAR}.out_proj", "B")], stored[name(f"{LINEAR}.out_proj", "B")])
    assert not any("mtp" in each for each in found)
    merged = torch.cat([stored[name(f"{ATTENTION}.{part}_proj", "B")] for part in "qkv"])
    assert torch.equal(found[name(f"{ATTENTION}.qkv_proj", "B")], merged)


def test_what_an_adapter_has_not_of_a_stack_is_zero(stacked):
    found, stored = stacked(rf"{ATTENTION}\.k_proj")
    k, b = stored[name(f"{ATTENTION}.k_proj", "B")], found[name(f"{ATTENTION}.qkv_proj", "B")]
    assert b.shape == (256 + 64 + 64, RANK) and torch.equal(b[256:320], k)
    assert not b[:256].any() and not b[320:].any()


@pytest.mark.parametrize(
    ("modules", "config", "words"),
    [
        (
            r".*\.experts\.1\.up_proj",
            {},
            "cannot adapt here, modules 4: model.layers.0.mlp.experts.1.up_proj",
        ),
        (r"lm_head", {}, "cannot adapt here"),
        (rf"{LINEAR}\.in_proj_ba", {"rank_pattern": {"in_proj_ba": 2}}, "rank_pattern, which SGLang ignores"),
        (rf"{LINEAR}\.in_proj_ba", {"r": 4}, "rank 3 in model.layers.0.linear_attn.in_proj_ba, and 4"),
    ],
)
def test_what_cannot_be_served_is_refused(stacked, modules, config, words):
    with pytest.raises(ValueError) as error:
        stacked(modules, **config)
    assert words in str(error.value)


def test_what_a_server_was_not_started_to_adapt_is_refused():
    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from torch import nn

    from sglang_ext.lora import check_served

    served = nn.Module()
    served.model = nn.Module()
    served.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    served.model.layers[0].linear_attn = nn.ModuleDict(
        {"in_proj_qkvz": BaseLayerWithLoRA(nn.Linear(1, 1), None), "in_proj_ba": nn.Linear(1, 1)}
    )
    served.model.layers[0].mlp = nn.ModuleDict({"gate_up_proj": BaseLayerWithLoRA(nn.Linear(1, 1), None)})
    elsewhere = "model.layers.1.linear_attn.in_proj_ba"  # on another rank of a pipeline
    check_served(served, [f"{LINEAR}.in_proj_qkvz", "model.layers.0.mlp.up_proj", elsewhere])
    with pytest.raises(ValueError, match=rf"not started to adapt, modules 1: {LINEAR}\.in_proj_ba"):
        check_served(served, [f"{LINEAR}.in_proj_qkvz", f"{LINEAR}.in_proj_ba"])
