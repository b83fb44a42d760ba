"""The compiled delta rule of a decode step is that of ``qnext_plugin.ops``, and touches only the states it is given."""

import pytest
import torch

from qnext_plugin import ops
from qnext_plugin.ops.cpu import delta_rule
from tests.support.tolerances import OPS, assert_close

SLOTS = 11


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize(
    ("n", "groups", "heads", "rows", "columns"), [(1, 1, 1, 16, 8), (5, 2, 6, 24, 40), (3, 4, 4, 7, 9)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode(dtype, n, groups, heads, rows, columns, num_threads):
    torch.manual_seed(n)
    qkv = torch.randn(n, 2 * groups * rows + heads * columns).to(dtype)
    q, k, v = qkv.split([groups * rows, groups * rows, heads * columns], dim=-1)  # rows with gaps, as they are served
    q, k, v = q.unflatten(-1, (groups, rows)), k.unflatten(-1, (groups, rows)), v.unflatten(-1, (heads, columns))
    g, beta = -torch.rand(n, heads), torch.rand(n, heads)
    states, slots = torch.full((SLOTS, heads, rows, columns), torch.nan), torch.randperm(SLOTS)[:n].int()
    states[slots] = torch.randn(n, heads, rows, columns)
    exact = [x.double() for x in (q, k, v)], {"g": g.double(), "beta": beta.double()}
    out, after = ops.recurrent_gated_delta_rule(*exact[0], **exact[1], initial_state=states[slots].double())
    assert delta_rule.serves(states)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_close(delta_rule.decode(q, k, v, g=g, beta=beta, states=states, slots=slots), out, OPS[dtype])
    finally:
        torch.set_num_threads(before)
    assert_close(states[slots], after, OPS[dtype])
    assert int(states.isnan().flatten(1).all(1).sum()) == SLOTS - n


@pytest.mark.parametrize("states", [torch.zeros(3, 2, 4, 4).bfloat16(), torch.zeros(3, 2, 4, 8)[..., :4]])
def test_states_that_it_does_not_serve(states):
    assert not delta_rule.serves(states)
