import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext_plugin import ops
from qnext_plugin.reference import formulas
from tests.support.tolerances import OPS, assert_close
from tests.support.trees import PARENTS, ancestors

HK, HV, K, V = 2, 6, 24, 40
LENGTHS = (1, 2, 3, 12, 13, 63, 64, 65, 130)
TOLERANCE = OPS[torch.float32]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(num_tokens, num_sequences=1, dtype=torch.float32, seed=0):
    """Random q, k, v, gates and states; half the tokens barely decay, so that old ones matter."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, num_tokens, HK, K).to(dtype)
    v = torch.randn(num_tokens, HV, V).to(dtype)
    g = -torch.rand(num_tokens, HV) * torch.tensor([0.01, 2.0]).repeat(HV // 2)
    return (q, k, v), {"g": g, "beta": torch.rand(num_tokens, HV)}, torch.randn(num_sequences, HV, K, V)


def expected(qkv, gates, state):
    """The float64 recurrence over one sequence: outputs, and the states after every token."""
    q, k, v = (x.double() for x in qkv)
    return formulas.gated_delta_rule(q, k, v, gates["g"].double(), gates["beta"].double(), state.double())


def part(qkv, gates, tokens):
    return [x[tokens] for x in qkv], {name: x[tokens] for name, x in gates.items()}


def prefill(qkv, gates, states, lengths, **kwargs):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return ops.chunk_gated_delta_rule(*qkv, **gates, initial_state=states, cu_seqlens=cu_seqlens, **kwargs)


def verify(qkv, gates, states, **kwargs):
    return ops.verify_gated_delta_rule(*qkv, **gates, initial_state=states, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gating_is_the_decay_and_the_write_strength(dtype):
    torch.manual_seed(0)
    a, b = (torch.rand(2, 5, HV) * 30 - 15).to(dtype)
    A_log, dt_bias = torch.randn(2, HV)
    g, beta = ops.gating(a, b, A_log=A_log, dt_bias=dt_bias)
    want = formulas.gating(a.double(), b.double(), A_log.double(), dt_bias.double())
    assert g.dtype == beta.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(g, want[0], OPS[g.dtype], "g")
    assert_close(beta, want[1], OPS[g.dtype], "beta")


def test_l2norm_of_zeros_is_zero_and_of_halves_does_not_overflow():
    assert ops.l2norm(torch.zeros(3, K)).eq(0).all()
    assert_close(ops.l2norm(torch.full((2, K), 6e4).half()), torch.full((2, K), K**-0.5), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_prefill_equals_the_recurrence(length, dtype):
    qkv, gates, state = inputs(length, dtype=dtype)
    if dtype == torch.float64:
        state = state.double()
    out, final = prefill(qkv, gates, state, [length])
    want, states = expected(qkv, gates, state[0])
    assert out.dtype == dtype and final.dtype == state.dtype
    assert_close(out, want, OPS[dtype], "out")
    assert_close(final[0], states[-1], OPS[final.dtype], "final_state")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_verify_keeps_the_state_after_every_position(dtype):
    sequences = [inputs(5, dtype=dtype, seed=seed) for seed in range(3)]
    qkv = [torch.stack(x) for x in zip(*(s[0] for s in sequences), strict=True)]
    gates = {name: torch.stack([s[1][name] for s in sequences]) for name in ("g", "beta")}
    initial = torch.cat([s[2] for s in sequences])
    before = initial.clone()
    out, states = verify(qkv, gates, initial)
    assert out.dtype == dtype and torch.equal(initial, before)
    for i, (qkv_i, gates_i, state) in enumerate(sequences):
        want = expected(qkv_i, gates_i, state[0])
        assert_close(out[i], want[0], OPS[dtype], "out")
        assert_close(states[i], want[1], TOLERANCE, "states")


def test_a_bfloat16_state_is_rounded_only_when_stored():
    qkv, gates, state = inputs(70)
    state = state.bfloat16()
    _, final = prefill(qkv, gates, state, [70])
    _, states = expected(qkv, gates, state[0])
    assert final.dtype == torch.bfloat16
    assert_close(final[0], states[-1].bfloat16(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_token_of_a_tree_follows_its_ancestors(dtype):
    size = len(PARENTS[0])
    qkv, gates, initial = inputs(3 * size, 3, dtype)
    tree = [x.unflatten(0, (3, size)) for x in qkv]
    tree_gates = {name: x.unflatten(0, (3, size)) for name, x in gates.items()}
    out, states = verify(tree, tree_gates, initial, parents=torch.tensor(PARENTS))
    for i, parents in enumerate(PARENTS):
        for token in range(size):
            path = [i * size + ancestor for ancestor in ancestors(parents, token)]
            want, want_states = expected(*part(qkv, gates, path), initial[i])
            assert_close(out[i, token], want[-1], OPS[dtype])
            assert_close(states[i, token], want_states[-1], TOLERANCE)


def test_packed_sequences_equal_separate_ones():
    lengths = [13, 0, 130, 64, 1, 65, 3]
    qkv, gates, states = inputs(sum(lengths), len(lengths))
    out, final = prefill(qkv, gates, states, lengths)
    start = 0
    for i, length in enumerate(lengths):
        tokens = slice(start, start + length)
        want, want_states = expected(*part(qkv, gates, tokens), states[i])
        assert_close(out[tokens], want, TOLERANCE, f"out of sequence {i}")
        assert_close(final[i], want_states[-1] if length else states[i], TOLERANCE, f"final_state of sequence {i}")
        start += length


@pytest.mark.parametrize("chunk_size", [1, 7, 128])
def test_chunk_size_does_not_matter(chunk_size):
    qkv, gates, states = inputs(90, 2)
    for actual, want in zip(
        prefill(qkv, gates, states, [20, 70], chunk_size=chunk_size),
        prefill(qkv, gates, states, [20, 70]),
        strict=True,
    ):
        assert_close(actual, want, TOLERANCE)


def test_strong_decay_neither_overflows_nor_leaks():
    qkv, gates, state = inputs(65)
    gates["g"] = gates["g"] * 1000
    out, final = prefill(qkv, gates, state, [65])
    want, states = expected(qkv, gates, state[0])
    assert_close(out, want, TOLERANCE)
    assert_close(final[0], states[-1], TOLERANCE)


def test_repeated_keys_written_in_full_stay_accurate():
    (q, k, v), gates, state = inputs(130)
    k, gates["g"], gates["beta"] = k[:1].expand_as(k), torch.zeros(130, HV), torch.ones(130, HV)
    out, final = prefill((q, k, v), gates, state, [130])
    want, states = expected((q, k, v), gates, state[0])
    assert_close(out, want, TOLERANCE)
    assert_close(final[0], states[-1], TOLERANCE)


def test_a_poisoned_sequence_does_not_reach_its_neighbors():
    lengths = [65, 70, 3]
    qkv, gates, states = inputs(sum(lengths), 3)
    clean_out, clean_final = prefill(qkv, gates, states, lengths)
    for x in (*qkv, *gates.values()):
        x[65:135] = float("nan")
    states[1] = float("nan")
    out, final = prefill(qkv, gates, states, lengths)
    neighbors = [*range(65), *range(135, 138)]
    assert torch.equal(out[neighbors], clean_out[neighbors])
    assert torch.equal(final[[0, 2]], clean_final[[0, 2]])


def test_padding_and_rejected_drafts_leave_no_trace():
    qkv, gates, state = inputs(6)
    draft = ([x[None] for x in qkv], {name: x[None] for name, x in gates.items()})
    out, states = verify(*draft, state)
    for x in (*draft[0], *draft[1].values()):
        x[:, 3:] = float("nan")
    padded_out, padded_states = verify(*draft, state)
    assert torch.equal(padded_out[:, :3], out[:, :3])
    assert torch.equal(padded_states[:, :3], states[:, :3])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["prefill", "decode", "verify"]), st.integers(1, 70)), min_size=1, max_size=5)
)
def test_any_mix_of_prefill_decode_and_verify_equals_the_whole(steps):
    steps = [(phase, {"prefill": n, "decode": 1, "verify": 1 + n % 4}[phase]) for phase, n in steps]
    total = sum(n for _, n in steps)
    qkv, gates, initial = inputs(total)
    want, want_states = expected(qkv, gates, initial[0])
    state, outs, start = initial, [], 0
    for phase, n in steps:
        qkv_n, gates_n = part(qkv, gates, slice(start, start + n))
        if phase == "prefill":
            out, state = prefill(qkv_n, gates_n, state, [n])
        elif phase == "decode":
            out, state = ops.recurrent_gated_delta_rule(*qkv_n, **gates_n, initial_state=state)
        else:
            # Two wrong drafts after the n right tokens: rejected.
            wrong, wrong_gates = inputs(n + 2, seed=1)[:2]
            for right, x in zip((*qkv_n, *gates_n.values()), (*wrong, *wrong_gates.values()), strict=True):
                x[:n] = right
            out, states = verify([x[None] for x in wrong], {name: x[None] for name, x in wrong_gates.items()}, state)
            out, state = out[0, :n], states[:, n - 1]
        outs.append(out)
        start += n
    assert_close(torch.cat(outs), want, TOLERANCE, "out")
    assert_close(state[0], want_states[-1], TOLERANCE, "state")
