import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext_plugin import ops
from qnext_plugin.reference import formulas
from tests.support.tolerances import OPS, assert_close
from tests.support.trees import PARENTS, ancestors

C, W = 10, 4
TOLERANCE = OPS[torch.float32]
ONE = torch.ones(1, dtype=torch.int32)


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(num_tokens, num_sequences=1, dtype=torch.float32, width=W):
    torch.manual_seed(0)
    shapes = (num_tokens, C), (C, width), (num_sequences, C, width - 1)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def prefill(x, weight, states, lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return ops.causal_conv1d(x, weight, conv_state=states, cu_seqlens=cu_seqlens)


def expected(x, weight, state):
    return formulas.causal_conv1d(x.double(), weight.double(), state.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 4])
def test_packed_sequences_equal_separate_ones(dtype, width):
    lengths = [1, 13, 2, 0, 3, 64]
    x, weight, states = inputs(sum(lengths), len(lengths), dtype, width)
    out, new_states = prefill(x, weight, states, lengths)
    assert out.dtype == new_states.dtype == dtype
    start = 0
    for i, length in enumerate(lengths):
        tokens = slice(start, start + length)
        if length:
            want, want_state = expected(x[tokens], weight, states[i])
            assert_close(out[tokens], want, OPS[dtype], f"out of sequence {i}")
            assert torch.equal(new_states[i].double(), want_state)
        else:
            assert torch.equal(new_states[i], states[i])
        start += length


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_update_equals_one_token_of_each_sequence(dtype):
    x, weight, states = inputs(5, 5, dtype)
    out, new_states = ops.causal_conv1d_update(x, weight, conv_state=states)
    assert out.dtype == dtype
    for i in range(5):
        want, want_state = expected(x[i : i + 1], weight, states[i])
        assert_close(out[i : i + 1], want, OPS[dtype])
        assert torch.equal(new_states[i].double(), want_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_verify_holds_the_window_of_every_accepted_prefix(dtype):
    num_drafts = 5
    x, weight, states = inputs(3 * num_drafts, 3, dtype)
    x = x.view(3, num_drafts, C)
    out, speculative = ops.causal_conv1d_verify(x, weight, conv_state=states, num_accepted=ONE.expand(3))
    assert out.dtype == dtype and speculative.shape == (3, C, W - 1 + num_drafts - 1)
    for accepted in [(1, 2, 3), (4, 5, 1)]:
        windows = ops.accepted_window(speculative, torch.tensor(accepted), W)
        for i, n in enumerate(accepted):
            want, window = expected(x[i, :n], weight, states[i])
            assert_close(out[i, :n], want, OPS[dtype])
            assert torch.equal(windows[i].double(), window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_token_of_a_tree_follows_its_ancestors(dtype):
    x, weight, states = inputs(3 * len(PARENTS[0]), 3, dtype)
    x = x.view(3, -1, C)
    out, windows = ops.causal_conv1d_tree(x, weight, conv_state=states, parents=torch.tensor(PARENTS))
    assert out.dtype == windows.dtype == dtype
    for i, parents in enumerate(PARENTS):
        for token in range(len(parents)):
            path = ancestors(parents, token)
            want, window = expected(x[i, path], weight, states[i])
            assert_close(out[i, token], want[-1], OPS[dtype])
            assert torch.equal(windows[i, token].double(), window)


def test_poison_in_padding_neighbors_and_rejected_columns_never_leaks():
    x, weight, states = inputs(12, 3)
    clean, clean_states = prefill(x, weight, states, [3, 5, 4])
    x[3:8], states[1] = float("nan"), float("nan")
    out, new_states = prefill(x, weight, states, [3, 5, 4])
    assert torch.equal(out[[0, 1, 2, 8, 9, 10, 11]], clean[[0, 1, 2, 8, 9, 10, 11]])
    assert torch.equal(new_states[[0, 2]], clean_states[[0, 2]])

    drafts, _, state = inputs(4)
    rejected = torch.full((1, C, 3), float("nan"))
    out, state = ops.causal_conv1d_verify(
        torch.cat([drafts, rejected[0].mT])[None], weight, conv_state=torch.cat([state, rejected], -1), num_accepted=ONE
    )
    assert not out[0, :4].isnan().any()
    assert not ops.accepted_window(state, ONE * 4, W).isnan().any()


def test_arguments_are_not_written_to():
    x, weight, states = inputs(6, 2)
    before = [t.clone() for t in (x, weight, states)]
    prefill(x, weight, states, [2, 4])
    ops.causal_conv1d_update(x[:2], weight, conv_state=states)
    ops.causal_conv1d_verify(x.view(2, 3, C), weight, conv_state=states, num_accepted=ONE.expand(2))
    assert all(torch.equal(a, b) for a, b in zip((x, weight, states), before, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["prefill", "decode", "verify"]), st.integers(1, 9)), min_size=1, max_size=6))
def test_any_mix_of_prefill_decode_and_verify_equals_the_whole(steps):
    steps = [(phase, {"prefill": n, "decode": 1, "verify": 1 + n % 4}[phase]) for phase, n in steps]
    x, weight, state = inputs(sum(n for _, n in steps))
    want, want_state = expected(x, weight, state[0])
    accepted, outs, start = 1, [], 0
    for phase, n in steps:
        tokens = x[start : start + n]
        if phase == "verify":
            drafts = torch.cat([tokens, torch.randn(2, C)])[None]
            out, state = ops.causal_conv1d_verify(drafts, weight, conv_state=state, num_accepted=ONE * accepted)
            out, accepted = out[0, :n], n
        else:
            window = ops.accepted_window(state, ONE * accepted, W)
            if phase == "prefill":
                out, state = prefill(tokens, weight, window, [n])
            else:
                out, state = ops.causal_conv1d_update(tokens, weight, conv_state=window)
            accepted = 1
        outs.append(out)
        start += n
    assert_close(torch.cat(outs), want, TOLERANCE, "out")
    assert torch.equal(ops.accepted_window(state, ONE * accepted, W)[0].double(), want_state)
