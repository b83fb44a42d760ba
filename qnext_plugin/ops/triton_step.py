"""A decode or verify step of a Gated DeltaNet layer between its projections, in one Triton launch.

Not imported by ``ops``: it needs Triton. No engine serves it yet; ``scripts/gpu-check`` proves and measures it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-untyped,import-not-found"
import triton
import triton.language as tl
from torch import Tensor

from qnext_plugin.config import GatedDeltaNetDims


def gated_delta_net_step(
    mixed_qkvz: Tensor,
    ba: Tensor,
    out: Tensor,
    *,
    dims: GatedDeltaNetDims,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    conv_state: Tensor,
    recurrent_state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    num_accepted: Tensor | None = None,
) -> None:
    """Convolution, gating, L2 norms, delta rule and gated norm of N sequences' last token and drafts.

    ``mixed_qkvz`` [T, conv_dim + value_dim], ``ba`` [T, 2 Hv], ``out`` [T, Hv, V], contiguous. The caches are updated
    in place, their slots at any stride: ``conv_state`` [slots, conv_dim, >= W - 1] in any order of the last two,
    ``recurrent_state`` [slots, Hv, V, K], contiguous in a slot. ``slots`` [N, D] (D = 1 without drafts; any stride
    between sequences) has one for the state after each token, the first also the convolution's, 0 for none: such a
    sequence's rows become zero. ``cu_seqlens`` [N + 1] int32; rows past its end become zero. ``num_accepted`` [N]
    of the last step's tokens were accepted, all of the one if None. The convolution is 4 wide.
    """
    assert dims.conv_kernel_size == 4 and out.is_contiguous() and slots.stride(1) == 1
    assert recurrent_state[0].is_contiguous()
    _step[(len(slots) + 1, dims.num_k_heads)](
        mixed_qkvz,
        ba,
        out,
        conv_weight,
        A_log,
        dt_bias,
        norm_weight,
        conv_state,
        recurrent_state,
        slots,
        cu_seqlens,
        num_accepted,
        dims.head_k_dim**-0.5,
        eps,
        len(slots),
        len(out),
        mixed_qkvz.stride(0),
        ba.stride(0),
        conv_weight.stride(0),
        *conv_state.stride(),
        recurrent_state.stride(0),
        slots.stride(0),
        num_accepted is not None,
        dims.num_k_heads,
        dims.heads_per_group,
        dims.head_k_dim,
        dims.head_v_dim,
        triton.next_power_of_2(dims.head_k_dim),
        triton.next_power_of_2(dims.head_v_dim),
        num_warps=8,
    )


@triton.jit
def _window(conv_state, channels, mask, first, stride_channel, stride_column):
    at = conv_state + channels * stride_channel + first * stride_column
    oldest = tl.load(at, mask=mask, other=0).to(tl.float32)
    older = tl.load(at + stride_column, mask=mask, other=0).to(tl.float32)
    old = tl.load(at + 2 * stride_column, mask=mask, other=0).to(tl.float32)
    return oldest, older, old


@triton.jit
def _convolve(oldest, older, old, x, weight, channels, mask, stride_weight):
    at = weight + channels * stride_weight
    out = oldest * tl.load(at, mask=mask, other=0).to(tl.float32)
    out += older * tl.load(at + 1, mask=mask, other=0).to(tl.float32)
    out += old * tl.load(at + 2, mask=mask, other=0).to(tl.float32)
    out += x * tl.load(at + 3, mask=mask, other=0).to(tl.float32)
    return out * tl.sigmoid(out)


@triton.jit
def _keep(conv_state, x, channels, mask, begin, length, first, stride_x, stride_channel, stride_column):
    """The two newest columns of history, then the step's own tokens."""
    _, older, old = _window(conv_state, channels, mask, first, stride_channel, stride_column)
    tl.debug_barrier()  # every column is read before any is written
    at = conv_state + channels * stride_channel
    element = conv_state.dtype.element_ty
    tl.store(at, older.to(element), mask=mask)
    tl.store(at + stride_column, old.to(element), mask=mask)
    for t in range(length):
        column = tl.load(x + (begin + t) * stride_x + channels, mask=mask, other=0)
        tl.store(at + (2 + t) * stride_column, column.to(element), mask=mask)


@triton.jit
def _step(
    x,
    ba,
    out,
    conv_weight,
    A_log,
    dt_bias,
    norm_weight,
    conv_cache,
    cache,
    slots,
    cu_seqlens,
    num_accepted,
    scale,
    eps,
    num_sequences,
    num_rows,
    stride_x,
    stride_ba,
    stride_weight,
    stride_conv_slot,
    stride_channel,
    stride_column,
    stride_slot,
    stride_slots,
    HAS_ACCEPTED: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One sequence and one key head with its ``R`` value heads: nobody else reads or writes its channels."""
    n, h = tl.program_id(0), tl.program_id(1)
    v_dim = tl.arange(0, BV)
    v_mask = v_dim < V
    begin = tl.load(cu_seqlens + n).to(tl.int64)
    if n == num_sequences:
        length = (num_rows - begin).to(tl.int64)
        slot = begin * 0
    else:
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - begin
        slot = tl.load(slots + n * stride_slots).to(tl.int64)
    if slot <= 0:
        for t in range(length):
            for r in range(R):
                row = ((begin + t) * H * R + h * R + r) * V
                tl.store(out + row + v_dim, tl.zeros([BV], out.dtype.element_ty), mask=v_mask)
        return

    first = begin * 0
    if HAS_ACCEPTED:
        first = tl.load(num_accepted + n).to(tl.int64) - 1
    source = tl.load(slots + n * stride_slots + first).to(tl.int64)
    conv_state = conv_cache + slot * stride_conv_slot
    k_dim = tl.arange(0, BK)
    k_mask = k_dim < K
    q_channels = h * K + k_dim
    k_channels = H * K + h * K + k_dim
    for r in range(R):
        head = h * R + r
        v_channels = 2 * H * K + head * V + v_dim
        tile = head * V * K + v_dim[:, None] * K + k_dim[None, :]
        tile_mask = v_mask[:, None] & k_mask[None, :]
        state = tl.load(cache + source * stride_slot + tile, mask=tile_mask, other=0).to(tl.float32)
        q0, q1, q2 = _window(conv_state, q_channels, k_mask, first, stride_channel, stride_column)
        k0, k1, k2 = _window(conv_state, k_channels, k_mask, first, stride_channel, stride_column)
        v0, v1, v2 = _window(conv_state, v_channels, v_mask, first, stride_channel, stride_column)
        decay_rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
        bias = tl.load(dt_bias + head).to(tl.float32)
        for t in range(length):
            row = x + (begin + t) * stride_x
            q3 = tl.load(row + q_channels, mask=k_mask, other=0).to(tl.float32)
            k3 = tl.load(row + k_channels, mask=k_mask, other=0).to(tl.float32)
            v3 = tl.load(row + v_channels, mask=v_mask, other=0).to(tl.float32)
            q = _convolve(q0, q1, q2, q3, conv_weight, q_channels, k_mask, stride_weight)
            k = _convolve(k0, k1, k2, k3, conv_weight, k_channels, k_mask, stride_weight)
            v = _convolve(v0, v1, v2, v3, conv_weight, v_channels, v_mask, stride_weight)
            q0, q1, q2 = q1, q2, q3
            k0, k1, k2 = k1, k2, k3
            v0, v1, v2 = v1, v2, v3
            q = q * tl.rsqrt(tl.sum(q * q) + 1e-6) * scale
            k = k * tl.rsqrt(tl.sum(k * k) + 1e-6)

            gates = ba + (begin + t) * stride_ba + head
            beta = tl.sigmoid(tl.load(gates).to(tl.float32))
            a = tl.load(gates + H * R).to(tl.float32) + bias
            softplus = tl.where(a > 20, a, tl.log(1 + tl.exp(tl.minimum(a, 20))))
            state *= tl.exp(decay_rate * softplus)
            delta = beta * (v - tl.sum(state * k[None, :], 1))
            state += delta[:, None] * k[None, :]
            core = tl.sum(state * q[None, :], 1)

            target = tl.load(slots + n * stride_slots + t).to(tl.int64)
            if target > 0:
                tl.store(cache + target * stride_slot + tile, state.to(cache.dtype.element_ty), mask=tile_mask)
            z = tl.load(row + 2 * H * K + H * R * V + head * V + v_dim, mask=v_mask, other=0).to(tl.float32)
            core *= tl.rsqrt(tl.sum(core * core) / V + eps) * z * tl.sigmoid(z)
            core *= tl.load(norm_weight + v_dim, mask=v_mask, other=0).to(tl.float32)
            place = out + ((begin + t) * H * R + head) * V + v_dim
            tl.store(place, core.to(out.dtype.element_ty), mask=v_mask)

    _keep(conv_state, x, q_channels, k_mask, begin, length, first, stride_x, stride_channel, stride_column)
    _keep(conv_state, x, k_channels, k_mask, begin, length, first, stride_x, stride_channel, stride_column)
    for r in range(R):
        v_channels = 2 * H * K + (h * R + r) * V + v_dim
        _keep(conv_state, x, v_channels, v_mask, begin, length, first, stride_x, stride_channel, stride_column)
