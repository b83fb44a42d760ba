import pytest
import torch

from qnext_plugin.checkpoint.lora import check_adapter
from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig

IN_PROJ, GATE = "model.layers.0.linear_attn.in_proj_qkvz", "model.layers.1.mlp.shared_expert_gate"
BEYOND = "model.layers.4.self_attn.q_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora") / "checkpoint"
    write_random_checkpoint(directory, overrides={"num_hidden_layers": 4, "num_experts": 3})
    return QNextConfig.from_pretrained(directory)


def pair(rows, columns, rank=3):
    return torch.zeros(rank, columns), torch.zeros(rows, rank)


def test_pairs_for_any_matrix_of_the_model_fit(config):
    matrices = {n.removesuffix(".weight"): s for n, s in expected_tensors(config, mtp=False).items() if len(s) == 2}
    check_adapter(config, {name: pair(*shape, rank=1 + i % 5) for i, (name, shape) in enumerate(matrices.items())})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (IN_PROJ, lambda a, b: (a[:, :-1], b), [IN_PROJ, "lora_A [3, 95]", "[rank, 96]"]),
        (IN_PROJ, lambda a, b: (a, b[:-1]), [IN_PROJ, "lora_B [767, 3]", "[768, rank]"]),
        (IN_PROJ, lambda a, b: (a[:2], b), [IN_PROJ, "lora_B [768, 3] lora_A [2, 96]"]),
        (IN_PROJ, lambda a, b: (None, b), ["missing", f"{IN_PROJ}.lora_A"]),
        (GATE, lambda a, b: (a, None), ["missing", f"{GATE}.lora_B"]),
        (BEYOND, lambda a, b: (a, b), ["not in this model", BEYOND]),
        ("model.layers.0.linear_attn.conv1d", lambda a, b: (a, b), ["not in this model", "conv1d"]),
        ("mtp.fc", lambda a, b: (a, b), ["not in this model", "mtp.fc"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(config, name, change, words):
    shape = expected_tensors(config).get(f"{name}.weight", (8, 8))
    fitting = {GATE: pair(1, 96)} if name != GATE else {}
    with pytest.raises(ValueError, match="adapter does not fit this model") as error:
        check_adapter(config, fitting | {name: change(*pair(*shape[:2]))})
    for word in words:
        assert word in str(error.value)
