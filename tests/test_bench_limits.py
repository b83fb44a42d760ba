"""The limits of `qnext bench`: what a step must move and compute, counted by hand."""

from pathlib import Path

import pytest
import torch

from qnext_plugin.bench.ceilings import Ceilings
from qnext_plugin.bench.limits import Model, limit
from qnext_plugin.checkpoint.headers import TensorInfo
from qnext_plugin.checkpoint.schema import expected_tensors
from qnext_plugin.config import QNextConfig
from qnext_plugin.plan.sizes import Serving

# One layer of each kind, so small that everything can be counted by hand.
COUNTED = {
    "vocab_size": 64,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 3,
    "shared_expert_intermediate_size": 2,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
}
# Numbers in matrices and in all: qkvz 26x4, ba 4x4, convolution 16x4, out 4x10; q and gate 16x4, k, v 4x4, o 4x8.
DELTA_NET, ATTENTION = (224, 224 + 9), (128, 128 + 8)
# Router, gate and shared expert; all four experts; a layer's norms; the final norm; the embedding, and the head.
DENSE, EXPERTS, NORMS, NORM, HEAD = 16 + 4 + 24, 4 * 36, 8, 4, 64 * 4
TRUNK = DELTA_NET[0] + ATTENTION[0] + 2 * DENSE
TRUNK_AND_VECTORS = DELTA_NET[1] + ATTENTION[1] + 2 * (DENSE + NORMS) + NORM
STATE = 16 * 3 * 2 + 2 * 3 * 5 * 4
DRAFTED_STATE = 16 * 5 * 2 + 2 * 3 * 5 * 4
KV = 2 * 4 * 2  # of one token


def model(drafts: int = 0, headers=None, **changes) -> Model:
    return Model(Serving(QNextConfig.from_dict(COUNTED | changes), 1, drafts), torch.float32, headers)


def test_decode_reads_each_weight_once_and_the_experts_that_are_likely_hit():
    one, three = model().decode(1, context=6), model().decode(3, context=6)
    assert one.bytes == 2 * (TRUNK_AND_VECTORS + EXPERTS + HEAD + 4) + 7 * KV + 2 * STATE == 2306
    likely = 2 * EXPERTS * (1 - 0.5**3)
    assert three.bytes == 2 * (TRUNK_AND_VECTORS + likely + HEAD + 12) + 3 * (7 * KV + 2 * STATE) == 3626
    assert one.flops == 2 * (TRUNK + EXPERTS + HEAD) + 4 * 2 * 4 * 7 + 6 * 30 == 2084
    assert three.flops == 3 * one.flops


def test_prefill_computes_the_head_once_for_each_prompt_and_attention_to_what_is_before():
    work = model().prefill(2, 5)
    assert work.flops == 2 * (10 * (TRUNK + EXPERTS) + 2 * HEAD) + 4 * 2 * 2 * 4 * 15 + 6 * 10 * 30 == 15464
    experts = 2 * EXPERTS * (1 - 0.5**10)
    assert work.bytes == 2 * (TRUNK_AND_VECTORS + experts + HEAD + 40) + 2 * (5 * KV + 2 * STATE)


def test_decode_with_drafts_verifies_them_and_passes_the_draft_once_for_each():
    work = model(drafts=2).decode(1, context=6)
    likely = 2 * EXPERTS * (1 - 0.5**3)
    trunk = 2 * (TRUNK_AND_VECTORS + likely + HEAD + 12) + 9 * KV + 2 * DRAFTED_STATE + 2 * 30 * 4
    fc, vectors = 4 * 8, 3 * NORM + NORMS
    draft = 2 * (fc + vectors + ATTENTION[1] + DENSE + EXPERTS / 2 + HEAD) + 7 * KV
    assert work.bytes == trunk + 2 * draft == 5402
    verified = 2 * 3 * (TRUNK + EXPERTS + HEAD) + 4 * 8 * (3 * 6 + 6) + 6 * 3 * 30
    drafted = 2 * (fc + ATTENTION[0] + DENSE + EXPERTS / 2 + HEAD) + 4 * 8 * 7
    assert work.flops == verified + 2 * drafted == 8924


def test_prefill_passes_the_draft_over_the_prompt_once():
    drafted = model(drafts=2).prefill(2, 5).flops - model().prefill(2, 5).flops
    each = 4 * 8 + ATTENTION[0] + DENSE + EXPERTS / 2
    prompt, token = 2 * (10 * each + 2 * HEAD) + 4 * 2 * 8 * 15, 2 * (2 * each + 2 * HEAD) + 4 * 2 * 8
    assert drafted == prompt + token


def test_a_tied_head_reads_the_embedding():
    tied, own = model(tie_word_embeddings=True).decode(1, 6), model().decode(1, 6)
    assert own.bytes - tied.bytes == 2 * 4  # the row of the token
    assert own.flops == tied.flops


def test_quantized_weights_have_the_bytes_of_their_headers():
    shapes = expected_tensors(QNextConfig.from_dict(COUNTED))
    headers = {n: TensorInfo(s, "I8" if "experts" in n.split(".") else "BF16", Path()) for n, s in shapes.items()}
    assert model().decode(1, 6).bytes - model(headers=headers).decode(1, 6).bytes == EXPERTS


def test_limit_is_what_takes_longer():
    moving = Ceilings(read=1000.0, copy=0.0, gemm=1e9)
    assert limit(model(), moving, batch=1, length=5, output=2) == pytest.approx(1 / 2.306)
    assert limit(model(), moving, batch=1, length=5, output=2, tokens_per_step=1.5) == pytest.approx(1.5 / 2.306)
    computing = Ceilings(read=1e9, copy=0.0, gemm=100.0)
    assert limit(model(), computing, batch=2, length=5) == pytest.approx(10 / 154.64)
