"""The guard around loading, with a model that is called in steps and one whose steps replay a graph."""

from typing import Any

import pytest
import torch

from qnext_plugin.checkpoint.coverage import RefusedUpdate
from qnext_plugin.checkpoint.guard import LoadGuard, Role, Weights
from qnext_plugin.checkpoint.merged import layer_name
from qnext_plugin.checkpoint.quantizers import FORMATS
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig

CONFIG = QNextConfig.from_dict(
    {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 3,
        "intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
)
K_PROJ = "model.layers.3.self_attn.k_proj.weight"
MISSHAPEN = (K_PROJ, torch.zeros(3, 5))


class Model:
    """What an engine's step calls: ``forward`` or, where that is captured, a replay of it, then ``compute_logits``."""

    def forward(self) -> str:
        return "states"

    def compute_logits(self) -> str:
        return "logits"

    def step(self, replayed: bool) -> str:
        if not replayed:
            self.forward()
        return self.compute_logits()


class Guard(LoadGuard):
    def __init__(self, role: Role = "trunk", *, drafts_required: bool = False, is_first: bool = False) -> None:
        super().__init__(CONFIG, role, drafts_required=drafts_required, is_first=is_first)
        self.check_first = True
        self.model = Model()
        self.copied: list[str] = []
        self.waits = False

    def takes(self, name: str) -> bool:
        return name.startswith("mtp.") == (self.role == "draft")

    def module(self, name: str) -> str:
        return layer_name(name.rpartition(".")[0])

    def entrances(self) -> list[tuple[Any, str]]:
        return [(self.model, "forward"), (self.model, "compute_logits")]

    def update(self, weights: Weights, copy: Any) -> set[str]:
        return copy(self.checked(weights, track=True)) if self.waits else super().update(weights, copy)

    def receive(self, weights: Weights) -> None:
        self.load(weights, lambda checked: {self.copied.append(name) or name for name, _ in checked})


def checkpoint(mtp: bool = True, **form: bool) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in expected_tensors(CONFIG, mtp=mtp, **form).items()]


def assert_stopped(guard: Guard, *words: str) -> None:
    for replayed in (False, True):
        with pytest.raises(RuntimeError, match="update is incomplete") as error:
            guard.model.step(replayed)
        assert all(word in str(error.value) for word in words), error.value


def assert_serves(guard: Guard) -> None:
    assert guard.model.step(replayed=False) == guard.model.step(replayed=True) == "logits"
    assert not vars(guard.model), "a step of a whole model calls what the class defines"


def test_listed_tensors_are_refused_before_any_is_copied() -> None:
    guard = Guard()
    with pytest.raises(RefusedUpdate, match="wrongly shaped"):
        guard.receive([*checkpoint(), MISSHAPEN])
    assert not guard.copied
    assert_serves(guard)


@pytest.mark.parametrize("form", [{}, {"split_in_proj": True, "fused_experts": True}])
def test_update_that_fails_half_way_stops_the_model_until_a_whole_checkpoint_has_come(form: dict[str, bool]) -> None:
    guard, tensors = Guard(), checkpoint(**form)
    with pytest.raises(RefusedUpdate):
        guard.receive(iter([*tensors[:5], MISSHAPEN]))
    assert len(guard.copied) == 5
    assert_stopped(guard, "wrongly shaped", "start again")
    guard.receive(tensors[:-40])
    assert_stopped(guard)
    guard.receive(tensors[-40:])
    assert_serves(guard)


def test_update_that_fails_at_its_first_tensor_changes_nothing() -> None:
    guard = Guard()
    with pytest.raises(RefusedUpdate):
        guard.receive(iter([MISSHAPEN]))
    assert_serves(guard)


def test_modules_with_a_part_of_their_weights_stop_the_model_until_the_rest_has_come() -> None:
    guard, whole = Guard(), dict(checkpoint())
    guard.waits = True
    guard.receive([(K_PROJ, whole[K_PROJ])])
    assert_stopped(guard, "model.layers.3.self_attn.qkv_proj")
    names = [K_PROJ.replace("k_proj", name) for name in ("q_proj", "v_proj")]
    guard.receive([(name, whole[name]) for name in names])
    assert_serves(guard)


def test_method_of_an_instance_is_put_back() -> None:
    """As of a compiled model."""
    guard = Guard()
    guard.model.forward = compiled = lambda: "compiled states"  # type: ignore[method-assign]
    with pytest.raises(RefusedUpdate):
        guard.receive(iter([*checkpoint()[:1], MISSHAPEN]))
    assert_stopped(guard)
    guard.receive(checkpoint())
    assert vars(guard.model) == {"forward": compiled}


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_module_is_whole_with_what_its_format_stores(format: str) -> None:
    leaves = FORMATS[format].leaves(torch.rand(256, 256), FORMATS[format].scheme(128))
    guard = Guard()
    guard.waits = True
    prefix = "model.layers.3.self_attn"
    guard.receive([(f"{prefix}.q_proj.{leaf}", torch.zeros(0, dtype=torch.int32)) for leaf in leaves])
    assert_stopped(guard, f"{prefix}.qkv_proj")
    for name in ("k_proj", "v_proj"):
        guard.receive([(f"{prefix}.{name}.{leaf}", torch.zeros(0, dtype=torch.int32)) for leaf in leaves])
    assert_serves(guard)


@pytest.mark.parametrize("role", ["trunk", "draft"])
def test_tensors_of_the_other_model_change_nothing(role: Role) -> None:
    guard = Guard(role)
    others = [(name, tensor) for name, tensor in checkpoint() if not guard.takes(name)]
    with pytest.raises(RefusedUpdate):
        guard.receive(iter([*others, MISSHAPEN]))
    assert_serves(guard)


def test_draft_waits_for_its_own_weights_only() -> None:
    guard, tensors = Guard("draft"), checkpoint()
    mtp = [(name, tensor) for name, tensor in tensors if name.startswith("mtp.")]
    with pytest.raises(RefusedUpdate):
        guard.receive(iter([*mtp[:1], MISSHAPEN]))
    assert_stopped(guard, "model.fc")
    guard.receive(mtp)
    assert_serves(guard)


@pytest.mark.parametrize("role", ["trunk", "draft"])
@pytest.mark.parametrize("required", [True, False])
def test_whether_drafts_are_required_does_not_depend_on_the_role(role: Role, required: bool) -> None:
    guard = Guard(role, drafts_required=required, is_first=True)
    if required:
        with pytest.raises(ValueError, match=r"has no mtp\.\* tensors"):
            guard.receive(checkpoint(mtp=False))
        assert guard.is_first
    guard.receive(checkpoint(mtp=required))
    assert not guard.is_first
