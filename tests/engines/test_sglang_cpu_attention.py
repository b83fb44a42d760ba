"""Attention over SGLang's cache on a CPU: FP8 with the layer's scales, and the same bits in every batch."""

from types import SimpleNamespace

import pytest
import torch

KV_HEADS, HEAD_DIM, TOKENS = 2, 32, 40
SCALES = (0.5, 2.0)


def cache(size: int, dtype: torch.dtype):
    from sglang_ext.cpu.attention import CpuKVPool

    return CpuKVPool(
        size=size,
        page_size=1,
        dtype=dtype,
        head_num=KV_HEADS,
        head_dim=HEAD_DIM,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )


def attention(k_scale: float | None = None, v_scale: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=0,
        tp_q_head_num=4,
        tp_k_head_num=KV_HEADS,
        qk_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        scaling=HEAD_DIM**-0.5,
        k_scale_float=k_scale,
        v_scale_float=v_scale,
    )


def attended(scales: tuple[float, float] | None, dtype: torch.dtype, largest: float = 1.0) -> torch.Tensor:
    """What one prompt's tokens attend to, through a pool of ``dtype``; ``largest`` is the size of the values."""
    from sglang_ext.cpu.attention import CpuAttentionBackend

    backend = CpuAttentionBackend.__new__(CpuAttentionBackend)
    locations = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:TOKENS] + 1
    backend.token_to_kv_pool = cache(64, dtype)
    backend.groups = [(slice(0, TOKENS), locations[None], None)]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, 4 * HEAD_DIM, generator=generator)
    k, v = torch.randn(2, TOKENS, KV_HEADS, HEAD_DIM, generator=generator)
    return backend.forward_extend(q, k, v * largest, attention(*scales or ()), SimpleNamespace(out_cache_loc=locations))


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize("scales", [None, (1.0, 1.0), SCALES])
def test_an_fp8_cache_loses_what_fp8_rounds(scales):
    exact = attended(scales, torch.float32)
    assert error(exact, attended(None, torch.float32)) == 0, "scales are for FP8 only"
    assert 0.001 < error(attended(scales, torch.float8_e4m3fn), exact) < 0.04


def test_scales_keep_what_fp8_alone_cannot_hold():
    """Values of a few thousand; FP8 ends at 448, and torch makes NaN of what is beyond."""
    exact = attended(None, torch.float32, 1000.0)
    assert error(attended((1.0, 16.0), torch.float8_e4m3fn, 1000.0), exact) < 0.04
    assert 0.1 < error(attended(None, torch.float8_e4m3fn, 1000.0), exact) < 1


def test_a_sequence_gets_the_same_bits_in_every_batch():
    """Of a step that decodes, where others are shorter and longer."""
    from sglang_ext.cpu.attention import CpuAttentionBackend

    lengths = torch.tensor([1, 2, 31, 33, 37, 64, 65, 130, 250, 257, 300, 511, 513, 700])
    starts = lengths.cumsum(0) - lengths
    pool = cache(int(lengths.sum()), torch.bfloat16)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
    backend = CpuAttentionBackend.__new__(CpuAttentionBackend)
    backend.token_to_kv_pool, backend.req_to_token = pool, torch.zeros(len(lengths), 720, dtype=torch.int32)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        backend.req_to_token[i, :length] = torch.arange(start, start + length)
    q = torch.randn(len(lengths), 4 * HEAD_DIM, generator=torch.Generator().manual_seed(2)).bfloat16()

    def rows(requests):
        backend.groups = backend._uniform(requests, lengths[requests] - 1, torch.ones(len(requests), 1, 1).bool())
        return backend.forward_decode(q[requests], None, None, attention(), SimpleNamespace())

    alone = torch.cat([rows(torch.tensor([i])) for i in range(len(lengths))])
    for size in range(2, len(lengths) + 1):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(size))[:size]
        assert torch.equal(rows(order), alone[order]), f"{size} sequences"
