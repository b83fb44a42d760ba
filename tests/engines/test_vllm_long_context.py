"""Contexts past the trained length, by YaRN as the model's card describes it, and prompts of 200,000 tokens."""

import json

import pytest
import torch
from transformers import AutoConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from qnext_plugin.checkpoint.make_random import write_random_checkpoint
from qnext_plugin.engines.config import EngineConfig
from qnext_plugin.verify.comparison import compare
from qnext_plugin.verify.reference import Whole
from qnext_plugin.verify.scenarios import Scenario, tokens
from qnext_plugin.verify.tolerances import SERVED_LOGPROB_FLOAT32
from tests.support.several import case, serve

pytestmark = pytest.mark.exhaustive

TRAINED = 512
SMALL = {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}
# One head, so that attention over 200,000 tokens takes a CPU a minute; dimensions that the C++ kernels take.
NARROW = {"num_hidden_layers": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2}
CONFIG = EngineConfig(token_budget=256, num_blocks=256)
LONG = EngineConfig(dtype="bfloat16", token_budget=2048)


def yarn(factor, original=TRAINED):
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def complete(parameters):
    """Every key of ``rope_parameters``, as an override may give them."""
    return {"rope_parameters": parameters | {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}}


def prompts(*lengths):
    return Scenario((tuple(tokens(length, seed=length) for length in lengths),), max_tokens=(8,))


def with_config(directory, target, **changes):
    """The same weights with another configuration, for the reference."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | changes))
    return target


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    write_random_checkpoint(root / "trained", dtype="float32", overrides=SMALL | {"max_position_embeddings": TRAINED})
    for factor in (2, 4):
        with_config(root / "trained", root / f"yarn-{factor}", rope_scaling=yarn(float(factor)))
    write_random_checkpoint(root / "long", overrides=NARROW | {"max_position_embeddings": 262_144})
    # What merging an adapter leaves: all that transformers saves, in shards, and no draft.
    merged = Qwen3NextForCausalLM.from_pretrained(root / "trained", dtype=torch.float32)
    merged.save_pretrained(root / "merged", max_shard_size="1MB")
    (root / "merged" / "args.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def served(checkpoints):
    long = {"max_model_len": 1_010_000, "hf_overrides": complete(yarn(4.0, 262_144))}
    cases = {
        "overrides-2": case(
            checkpoints / "trained",
            CONFIG,
            (prompts(100, 1000),),
            max_model_len=1024,
            hf_overrides=complete(yarn(2.0)),
        ),
        "overrides-4": case(
            checkpoints / "trained",
            CONFIG,
            (prompts(513, 2000),),
            max_model_len=2048,
            hf_overrides=complete(yarn(4.0)),
        ),
        "config-4": case(checkpoints / "yarn-4", CONFIG, (prompts(513, 2000),), max_model_len=2048),
        "merged": case(checkpoints / "merged", CONFIG, (prompts(7, 300),), max_model_len=TRAINED),
        "long": case(checkpoints / "long", LONG, (prompts(20_000), prompts(200_000)), **long),
    }
    return serve(checkpoints, cases, env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})


@pytest.mark.parametrize(
    ("name", "same_as"),
    [("overrides-2", "yarn-2"), ("overrides-4", "yarn-4"), ("config-4", "yarn-4"), ("merged", "merged")],
)
def test_answers_are_those_of_transformers(served, checkpoints, name, same_as):
    assert "error" not in served[name], served[name]["error"]
    assert served[name]["modules"] == ["vllm_ext.model"]
    tolerance = SERVED_LOGPROB_FLOAT32["vllm"]
    difference = compare(served[name]["results"][0], Whole(checkpoints / same_as), tolerance)
    print(f"{name}: {difference.max:.3g} at {difference.worst}")
    assert difference.max <= tolerance, f"{difference.max:.3g} at {difference.worst}"
    if name != "merged":  # else the extension of the context shows nothing
        plain = compare(served[name]["results"][0], Whole(checkpoints / "trained"), tolerance)
        assert plain.max > 100 * tolerance


def test_rope_tables_equal_those_of_transformers_up_to_a_million_positions(served, checkpoints):
    assert "error" not in served["long"], served["long"]["error"]
    config = AutoConfig.from_pretrained(checkpoints / "long")
    config.rope_parameters = complete(yarn(4.0, 262_144))["rope_parameters"]
    rows = {int(position): torch.tensor(row) for position, row in served["long"]["rope"].items()}
    assert max(rows) == 1_009_999
    rotary = Qwen3NextRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([list(rows)]))
    half = cos.shape[-1] // 2
    expected = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).float()
    assert torch.equal(torch.stack(list(rows.values())), expected)


def test_a_long_prompt_takes_no_more_memory_than_a_short_one(served):
    """In chunks: a tenfold prompt costs its tokens and their slots, less than one hidden state of each token."""
    assert "error" not in served["long"], served["long"]["error"]
    short, long = served["long"]["memory"]
    whole_prompt = 180_000 * 96 * 2  # one bfloat16 activation of as many tokens more
    print(f"{(long - short) / 1e6:.1f} MB more for 180,000 tokens more")
    assert long - short < whole_prompt
    assert all(torch.isfinite(c.logprobs).all() for c in served["long"]["results"][1].batches[0])
