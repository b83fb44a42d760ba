"""Contracts of the C++ operators that vLLM's Qwen3-Next reaches: what they demand and what they return."""

import torch

from tests.gpu.dry import deep_gemm, scales
from tests.gpu.dry.tensors import version

FAKES: dict = dict(deep_gemm.FAKES)


def fake(*names: str):
    def register(function):
        for name in names:
            FAKES[name] = function
        return function

    return register


def check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"contract: {message}")


@fake("_C::get_cuda_view_from_cpu_tensor")
def get_cuda_view_from_cpu_tensor(tensor):
    """The GPU reads host memory: what the host writes there later is known too."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
    out._host = tensor, version(out)
    return out


@fake("_vllm_fa3_C::get_scheduler_metadata")
def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype, seqused_k, *_
):
    check(seqused_k.dtype == torch.int32, f"FA3 wants sequence lengths in int32, not {seqused_k.dtype}")
    return torch.empty(1 + -(-batch_size // 4) * 16, dtype=torch.int32, device=seqused_k.device)


def attention(q, k, v, out, **integers):
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(
            x.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn), f"FlashAttention takes no {x.dtype} {name}"
        )
        check(x.stride(-1) == 1, f"FlashAttention wants {name} contiguous in its last dimension, strides {x.stride()}")
        check(x.data_ptr() % 16 == 0, f"FlashAttention wants {name} aligned to 16 bytes")
    check(q.dtype == k.dtype == v.dtype, "FlashAttention wants one type")
    check(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"FlashAttention takes no heads of {q.shape[-1]}")
    check(q.shape[-2] % k.shape[-2] == 0, f"{q.shape[-2]} heads on {k.shape[-2]}")
    for name, x in integers.items():
        if x is not None:
            check(x.dtype == torch.int32, f"FlashAttention wants {name} in int32, not {x.dtype}")
            check(x.stride(-1) == 1, f"FlashAttention wants {name} contiguous")
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    result = out if out is not None else q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
    return [result, q.new_empty(q.shape[-2], *q.shape[:-2], dtype=torch.float32), q.new_empty(0), q.new_empty(0)]


@fake("_vllm_fa3_C::fwd")
def flash_attention_3(
    q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, *_,
):  # fmt: skip
    if k.dtype == torch.float8_e4m3fn:
        scales.use("attention", k.dtype, k_descale, v_descale)
    return attention(
        q, k, v, out, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, page_table=page_table
    )


@fake("_C_cache_ops::reshape_and_cache_flash")
def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    check(slot_mapping.dtype == torch.int64, f"the cache's slots are int64, not {slot_mapping.dtype}")
    check(key.dtype == value.dtype, "keys and values have one type")
    if kv_cache_dtype.startswith("fp8"):
        check(key_cache.dtype == value_cache.dtype == torch.uint8, f"a cache in FP8 is of bytes, not {key_cache.dtype}")
        scales.use("write", kv_cache_dtype, k_scale, v_scale)
    else:
        check(key_cache.dtype == key.dtype, f"{key.dtype} is not written to a cache of {key_cache.dtype}")


@fake("_vllm_fa2_C::varlen_fwd")
def flash_attention_2(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, *_):
    return attention(q, k, v, out, cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, block_table=block_table)[:2]


@fake("_C::fused_gdn_decode_post_conv_mtp")
def fused_gdn_decode_post_conv_mtp(
    mixed_qkv, a, b, A_log, dt_bias, state_indices, cu_seqlens, num_accepted_tokens, state, output_gate, norm_weight,
    out, scale, norm_eps=1e-5, output_gate_activation="silu",
):  # fmt: skip
    """The checks that the compiled operator of vLLM 0.33 makes, from the messages in its library."""
    bf16, f32 = torch.bfloat16, torch.float32
    for name, x in (("mixed_qkv", mixed_qkv), ("a", a), ("b", b), ("output_gate", output_gate), ("out", out)):
        check(x.dtype == bf16, f"{name} must be bfloat16, not {x.dtype}")
    check(A_log.dtype == f32, "A_log must be float32")
    check(dt_bias.dtype in (f32, bf16, torch.float16), "dt_bias must be float32, bfloat16 or float16")
    for name, x in (
        ("state_indices", state_indices),
        ("cu_seqlens", cu_seqlens),
        ("num_accepted_tokens", num_accepted_tokens),
    ):
        check(x.dtype == torch.int32, f"{name} must be int32, not {x.dtype}")
        check(x.is_contiguous(), f"{name} must be contiguous, strides {x.stride()} of {tuple(x.shape)}")
    check(
        state.dtype in (f32, bf16) and norm_weight.dtype in (f32, bf16),
        "state and norm_weight must be float32 or bfloat16",
    )
    check(output_gate_activation in ("silu", "sigmoid"), f"activation {output_gate_activation}")
    _, HV, V, K = state.shape
    check((V, K) == (128, 128), f"state must have shape [slots, HV, 128, 128], not {tuple(state.shape)}")
    n, width = mixed_qkv.shape
    H2 = width - HV * 128
    check(n > 0 and H2 > 0 and H2 % 256 == 0, "mixed_qkv width is inconsistent with state")
    check(HV % (H2 // 256) == 0 and HV // (H2 // 256) in (1, 2, 3, 4, 8), "HV/H must be 1, 2, 3, 4 or 8")
    N, S = state_indices.shape
    check(1 <= S <= 8, "state_indices must have shape [N, S] with 1 <= S <= 8")
    check(
        cu_seqlens.shape == (N + 1,) and num_accepted_tokens.shape == (N,),
        f"{N} sequences, {tuple(cu_seqlens.shape)}, {tuple(num_accepted_tokens.shape)}",
    )
    check(
        A_log.is_contiguous() and A_log.numel() == HV and dt_bias.is_contiguous() and dt_bias.numel() == HV,
        "A_log, dt_bias",
    )
    check(norm_weight.is_contiguous() and norm_weight.numel() == 128, "norm_weight")
    for name, x in (("output_gate", output_gate), ("out", out)):
        check(x.shape == (n, HV, 128), f"{name} must have shape [L, HV, 128], not {tuple(x.shape)}")
        check(x.stride()[1:] == (128, 1), f"{name} head rows must be contiguous, strides {x.stride()}")
    check(a.shape == b.shape == (n, HV), f"a and b must have shape [L, HV], not {tuple(a.shape)}")
    check(mixed_qkv.stride(1) == 1 and a.stride(1) == 1 and b.stride(1) == 1, "channels and heads must be contiguous")
    check(state.stride()[1:] == (128 * 128, 128, 1), f"state slots must be contiguous, strides {state.stride()}")
    check(
        state.stride(0) * state.element_size() % 16 == 0 and state.data_ptr() % 16 == 0,
        "state slots must be aligned to 16 bytes",
    )


@fake("_moe_C::moe_wna16_marlin_gemm")
def moe_wna16_marlin_gemm(
    x, out, weight, bias, scales, x_scales, global_scale, zeros, workspace, token_ids, expert_ids, padded, topk_weights,
    block, top_k, multiplies, kind, tokens, rows, inputs, *_,
):  # fmt: skip
    """vLLM 0.33's own fake has fewer parameters than its operator."""
    check(x.shape == (tokens, inputs) and x.is_contiguous(), f"{tokens} x {inputs} inputs, {tuple(x.shape)}")
    check(scales.dtype == x.dtype, f"scales of the inputs' type, {scales.dtype}")
    check(scales.shape[::2] == (len(weight), rows), f"scales of {rows} rows, {tuple(scales.shape)}")
    check(weight.shape[1:] == (inputs // 16, 2 * rows), f"tiles of {inputs} x {rows} in 4 bits, {tuple(weight.shape)}")
    for name, ids in (("workspace", workspace), ("token_ids", token_ids), ("expert_ids", expert_ids)):
        check(ids.dtype == torch.int32, f"{name} in int32, not {ids.dtype}")
    for name, each in (("weight", weight), ("scales", scales), ("token_ids", token_ids)):
        check(each.is_contiguous(), f"{name} contiguous, strides {each.stride()}")
    return x.new_empty(tokens * top_k, rows) if out is None else out


@fake("_C::weak_ref_tensor")
def weak_ref_tensor(tensor):
    return tensor
