import copy
import math

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)

from qnext_plugin.config import QNextConfig
from qnext_plugin.reference import ReferenceModel, formulas
from tests.support.tolerances import LOGPROB_FLOAT32, OPS, assert_close

LENGTH = 70  # more than one chunk of transformers' delta rule

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 20,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
ODD = {
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mlp_only_layers": [2],
    "attention_bias": True,
    "tie_word_embeddings": True,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 12,
    "norm_topk_prob": False,
    "rope_parameters": YARN,
}
CONFIGS = {
    "published": {},
    "odd, one value head per key head": {**ODD, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
    "odd, four value heads per key head": {**ODD, "linear_num_value_heads": 8},
    "a mixture of experts in every other layer": {"decoder_sparse_step": 2},
    "width-2 convolution, one KV head": {"linear_conv_kernel_dim": 2, "num_key_value_heads": 1},
}


def randomize(module):
    """Weights of a size to show in the logits, norms and biases included, and decays that remember about ten tokens.

    (With transformers' own strong decays a DeltaNet output is nearly ``(q . k) v``, and where ``q . k`` is close to 0
    its norm magnifies rounding.)
    """
    for name, parameter in module.named_parameters():
        scale = 0.3 if parameter.dim() == 1 or "embed" in name else parameter.shape[-1] ** -0.5
        centre = -2 if name.endswith("A_log") else 1 if name.endswith("linear_attn.norm.weight") else 0
        parameter.data = centre + scale * torch.randn_like(parameter)


def checkpoint_names(state_dict):
    """Experts under their published names; transformers keeps them fused."""
    weights = {}
    for name, tensor in state_dict.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not stem.endswith("mlp.experts"):
            weights[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if last == "gate_up_proj" else [matrix]
            for part, rows in zip(last.removesuffix("_proj").split("_"), parts, strict=True):
                weights[f"{stem}.{expert}.{part}_proj.weight"] = rows
    return weights


def build(overrides):
    """A random transformers model, our config of it, and its weights under checkpoint names."""
    torch.manual_seed(0)
    raw = {**COMMON, **overrides}
    hf_config = Qwen3NextConfig(**copy.deepcopy(raw), attn_implementation="eager", experts_implementation="eager")
    model = Qwen3NextForCausalLM(hf_config).eval()
    randomize(model)
    model.tie_weights()
    weights = checkpoint_names(model.state_dict())
    if hf_config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    return model, QNextConfig.from_dict(raw), weights


def assert_same_logprobs(logits, want, tolerance):
    error = (logits.log_softmax(-1) - want.log_softmax(-1)).abs().max()
    assert error <= tolerance, f"largest log-probability error {error:.3g}"


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_and_hidden_equal_transformers(overrides):
    model, config, weights = build(overrides)
    input_ids = torch.randint(config.vocab_size, (LENGTH,))
    want = model(input_ids[None], output_hidden_states=True)
    logits, hidden = ReferenceModel(config, weights, torch.float32).forward(input_ids)
    assert logits.dtype == torch.float32
    assert_same_logprobs(logits, want.logits[0], LOGPROB_FLOAT32)
    assert_close(hidden, want.hidden_states[-1][0], OPS[torch.float32], "hidden")


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers_computed_in_float64(overrides, monkeypatch):
    model, config, weights = build(overrides)
    input_ids = torch.randint(config.vocab_size, (LENGTH,))
    logits, _ = ReferenceModel(config, weights).forward(input_ids)
    # transformers casts to float32 inside norms, gates, softmax and RoPE whatever the model's dtype.
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model.double().model.rotary_emb = Qwen3NextRotaryEmbedding(model.config)
    assert_same_logprobs(logits, model(input_ids[None]).logits[0], OPS[torch.float64])


@torch.no_grad()
def test_a_published_config_and_a_transformers_one_give_the_same_logits():
    _, config, weights = build({"rope_parameters": YARN})
    published = {k: v for k, v in {**COMMON, "full_attention_interval": 4}.items() if k != "rope_parameters"}
    scaling = {k: v for k, v in YARN.items() if k not in ("rope_theta", "partial_rotary_factor")}
    published |= {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": scaling}
    input_ids = torch.arange(LENGTH)
    logits = [ReferenceModel(c, weights).forward(input_ids)[0] for c in (config, QNextConfig.from_dict(published))]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"truncate": False},
        {"attention_factor": 1.7},
        {"mscale": 0.7, "mscale_all_dim": 0.3},
        {"beta_fast": 8, "beta_slow": 2},
        {"factor": 1.0},
    ],
    ids=str,
)
def test_yarn_frequencies_equal_transformers(extra):
    rope = {**YARN, "rope_theta": 1e7, "original_max_position_embeddings": 4096, **extra}
    frequencies, factor = formulas.rope_frequencies(rope, 64, torch.float64)
    hf_config = Qwen3NextConfig(**{**COMMON, "head_dim": 128, "rope_parameters": dict(rope)})
    want = Qwen3NextForCausalLM(hf_config).model.rotary_emb
    assert_close(frequencies, want.inv_freq, 1e-6, "frequencies")
    assert_close(frequencies.log(), want.inv_freq.log(), 1e-6, "log frequencies")
    assert factor == pytest.approx(want.attention_scaling)


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it():
    _, config, weights = build(CONFIGS["odd, four value heads per key head"])
    reference = ReferenceModel(config, weights)
    input_ids = torch.randint(config.vocab_size, (20,))
    long, short = reference.forward(input_ids)[0], reference.forward(input_ids[:13])[0]
    assert_close(long[:13], short, 1e-12)


def build_mtp(overrides):
    """`build`, with an MTP module made of transformers' own parts."""
    model, config, weights = build(overrides)
    hf_config = copy.deepcopy(model.config)
    hf_config.layer_types = ["full_attention"]
    size, eps = config.hidden_size, config.rms_norm_eps
    mtp = torch.nn.ModuleDict(
        {
            "fc": torch.nn.Linear(2 * size, size, bias=False),
            "layers": torch.nn.ModuleList([Qwen3NextDecoderLayer(hf_config, 0)]),
            **{name: Qwen3NextRMSNorm(size, eps) for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")},
        }
    ).eval()
    randomize(mtp)
    weights |= checkpoint_names({f"mtp.{name}": tensor for name, tensor in mtp.state_dict().items()})
    return model, mtp, ReferenceModel(config, weights, torch.float32)


def transformers_mtp(model, mtp, next_ids, hidden):
    embedding = model.model.embed_tokens(next_ids)
    fused = torch.cat([mtp["pre_fc_norm_embedding"](embedding), mtp["pre_fc_norm_hidden"](hidden)], dim=-1)
    length = len(next_ids)
    out = mtp["layers"][0](
        mtp["fc"](fused)[None],
        position_embeddings=model.model.rotary_emb(hidden[None], torch.arange(length)[None]),
        attention_mask=torch.full((1, 1, length, length), -math.inf).triu(1),
    )
    hidden = mtp["norm"](out)[0]
    return model.lm_head(hidden), hidden


@pytest.mark.parametrize("overrides", [{}, ODD, {"mlp_only_layers": [0]}], ids=["published", "odd", "dense"])
@torch.no_grad()
def test_mtp_and_its_further_steps_equal_transformers_parts(overrides):
    model, mtp, reference = build_mtp(overrides)
    input_ids = torch.randint(COMMON["vocab_size"], (LENGTH,))
    next_ids, hidden = input_ids[1:], reference.forward(input_ids)[1][:-1]
    for _ in range(3):
        logits, drafted = reference.mtp_forward(next_ids, hidden)
        want_logits, want_drafted = transformers_mtp(model, mtp, next_ids, hidden)
        assert_same_logprobs(logits, want_logits, LOGPROB_FLOAT32)
        assert_close(drafted, want_drafted, OPS[torch.float32], "hidden")
        next_ids = torch.cat([next_ids, logits[-1:].argmax(-1)])
        hidden = torch.cat([hidden, drafted[-1:]])


def test_a_missing_tensor_is_named():
    _, config, weights = build({})
    del weights["model.layers.1.linear_attn.A_log"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.linear_attn\.A_log"):
        ReferenceModel(config, weights).forward(torch.arange(3))
