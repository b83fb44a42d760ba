"""`qnext plan` foretells what the engine allocates: every number within 1%, most of them to the byte."""

import pytest
import torch

from qnext_plugin.checkpoint.stored import read_checkpoint
from qnext_plugin.config import QNextConfig
from qnext_plugin.engines.config import MAX_MODEL_LEN, VLLM_BLOCK_SIZE
from qnext_plugin.plan.caches import DEVICES, SglangCache, VllmCache, default_state_dtype
from qnext_plugin.plan.sizes import Serving
from tests.support.installed import ENGINE
from tests.support.matrix import CONFIGS, MATRIX, configs

CACHE_MEMORY = 2**30  # VLLM_CPU_KVCACHE_SPACE of every engine test
NAMES = [
    name
    for name in configs(ENGINE)
    if CONFIGS[name].pipeline_parallel == 1
    and MATRIX[name].drafts == "mtp"
    and "--speculative-config" not in CONFIGS[name].flags
]


def within(found: float, foretold: float) -> bool:
    return abs(found - foretold) <= 0.01 * foretold


@pytest.fixture
def case(request, serve, checkpoint):
    config, directory = CONFIGS[request.param], checkpoint(MATRIX[request.param].checkpoint)
    dtype = getattr(torch, config.dtype)
    stored = read_checkpoint(str(directory))
    model = stored.complete(QNextConfig.from_dict(stored.config))
    serving = Serving(model, config.tensor_parallel, config.draft_tokens, dtype)
    weights = sum(serving.weights(stored.headers).values())
    assert weights == sum(serving.weights().values()), "the headers say something else than config.json"
    return config, serving, weights, serve(request.param).serving["memory"]


@pytest.mark.only("vllm")
@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_vllm_blocks(case):
    config, serving, _, memory = case
    words = config.flags
    asked = int(words[words.index("--block-size") + 1]) if "--block-size" in words else VLLM_BLOCK_SIZE
    block_size = asked if config.prefix_caching else None
    state_dtype = default_state_dtype("vllm", "cpu", {}, serving.dtype)
    cache = VllmCache(serving, state_dtype, DEVICES["cpu"], config.prefix_caching, block_size)
    assert memory["block_size"] == cache.block_size
    num_blocks = config.num_blocks or cache.num_blocks(CACHE_MEMORY)
    assert within(memory["num_blocks"], num_blocks)
    assert within(memory["concurrency"], num_blocks / cache.blocks(MAX_MODEL_LEN))


@pytest.mark.only("sglang")
@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_sglang_weights_and_pools(case):
    """Weights on this engine only: on CPU vLLM packs them in forms of its own, and drops the parameters."""
    config, serving, weights, memory = case
    assert within(memory["weights"], weights)
    cache = SglangCache(serving, torch.float32, config.prefix_caching)
    assert within(memory["states"] / memory["slots"], cache.state_bytes)
    assert within(memory["keys_and_values"] / memory["tokens"], serving.kv_bytes_per_token)
