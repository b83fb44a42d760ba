"""Our CPU versions of SGLang's speculative kernels against SGLang's own, which ``TRITON_INTERPRET=1`` runs on a CPU.

Trees are drafted as the engine drafts them: of every size up to the width tested, batches with other lengths each.
"""

import itertools
import sys
from collections import Counter
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from sglang.kernels.ops.elementwise.elementwise import fused_sigmoid_mul
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.srt.mem_cache import allocation
from sglang.srt.speculative.eagle_utils import organize_draft_results
from sglang.srt.speculative.spec_utils import _select_top_k_tokens_first, _select_top_k_tokens_later

from sglang_ext.cpu import gated_delta_net as kernels
from sglang_ext.cpu import speculation as ours
from sglang_ext.cpu import trees

N, VOCAB = 3, 11
SHAPES = [(1, 1, 2), (1, 3, 4), (2, 1, 2), (2, 1, 3), (2, 3, 4), (2, 3, 9), (3, 4, 12)]  # topk, steps, tokens


def drafted(topk: int, steps: int, num_tokens: int) -> tuple[Any, ...]:
    """Random drafts, chosen by the engine's own functions: parents, places and tokens."""
    lists: tuple[list[Any], ...] = ([], [], [])
    scores, hidden = None, torch.zeros(N, 1)
    for step in range(steps):
        rows = N if step == 0 else N * topk
        p, index = torch.rand(rows, VOCAB).softmax(-1).topk(topk)
        if step == 0:
            _, hidden, scores, info = _select_top_k_tokens_first(p, index, hidden, topk)
        else:
            later = _select_top_k_tokens_later._torchdynamo_orig_callable
            _, hidden, scores, info = later(step, p, index, hidden, scores, topk)
        for part, kept in zip(info, lists, strict=True):
            kept.append(part)
    return organize_draft_results(*lists, num_tokens)


def build(function: Any, mode: Any, drafts: tuple[Any, ...], topk: int, steps: int, num_tokens: int) -> list[Any]:
    parents, places, _ = drafts
    lengths = torch.tensor([5, 1, 8])
    mask = torch.ones(N * num_tokens**2, dtype=torch.bool)
    links = list(torch.full((3, N, num_tokens), -1))
    positions = torch.empty(N * num_tokens, dtype=torch.long)
    function(parents, places, lengths, mask, positions, *links, topk, steps, num_tokens, mode)
    return [mask, positions, *links]


def check_trees() -> None:
    for shape in SHAPES * 3:
        drafts = drafted(*shape)
        mode = spec_tree.TreeMaskMode.QLEN_ONLY
        want = build(spec_tree.sgl_build_tree_kernel_triton, mode, drafts, *shape)
        actual = build(ours.build_tree_kernel_efficient_func, mode, drafts, *shape)
        assert all(torch.equal(a, b) for a, b in zip(actual, want, strict=True)), shape
        check_greedy(drafts[2], actual[2:], *shape)
        check_links(actual, shape[2])


def check_links(built: list[torch.Tensor], num_tokens: int) -> None:
    """What NGRAM reads from the mask of a tree is what it was built with, and what SGLang's kernel reads."""
    mask, lengths, size = built[0], torch.tensor([5, 1, 8]), N * num_tokens
    kernels = ModuleType("sgl_kernel.speculative")
    kernels.reconstruct_indices_from_tree_mask = None  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"sgl_kernel": ModuleType("sgl_kernel"), kernels.__name__: kernels}):
        from sglang.kernels.ops.speculative import reconstruct_tree
    for function in (
        reconstruct_tree.reconstruct_indices_from_tree_mask_triton,
        trees.reconstruct_indices_from_tree_mask_func,
    ):
        links = list(torch.full((3, N, num_tokens), 77))
        positions = torch.empty(size, dtype=torch.long)
        function(mask, lengths, positions, *links, N, num_tokens)
        assert all(torch.equal(a, b) for a, b in zip([positions, *links], built[1:], strict=True))


def check_greedy(tokens: torch.Tensor, links: list[torch.Tensor], topk: int, steps: int, num_tokens: int) -> None:
    candidates = torch.cat([torch.zeros(N, 1, dtype=torch.long), tokens], 1)
    results = []
    # What the model chose is half the time what some draft says.
    chosen = torch.where(torch.rand(N, num_tokens) < 0.5, candidates.roll(-1, 1), torch.randint(VOCAB, (N, num_tokens)))
    for function in (spec_tree.verify_tree_greedy_triton, ours.verify_tree_greedy_func):
        predicts = torch.zeros(N * num_tokens, dtype=torch.int32)
        index = torch.full((N, steps + 1), -1, dtype=torch.int32)
        accepted = torch.empty(N, dtype=torch.int32)
        function(predicts, index, accepted, candidates, *links, chosen)
        results.append((index, accepted, predicts[index[index >= 0]]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_slots() -> None:
    table = torch.randint(100, (5, 40), dtype=torch.int32)
    requests, start, end = torch.tensor([3, 1, 4]), torch.tensor([7, 0, 20]), torch.tensor([9, 0, 25])
    out = torch.empty(7, dtype=torch.long)
    cache_locs.assign_extend_cache_locs[(N,)](requests, table, start, end, out, 40, 4)
    actual = ours.assign_extend_cache_locs(
        req_pool_indices=requests, req_to_token=table, start_offset=start, end_offset=end
    )
    assert torch.equal(actual, out)
    both = []
    for module in (cache_locs, ours):
        drafts = torch.empty(N * 6, dtype=torch.long)
        module.assign_draft_cache_locs_contiguous_func(requests, table, start, drafts, 2, 3)
        front = torch.zeros(N * 4, dtype=torch.long)
        module.fill_front_out_cache_loc_func(torch.tensor([2, 1, 4]), torch.arange(12) + 50, front)
        both.append((drafts, front))
    for module in (eagle, ours):
        index = torch.tensor([[0, 2, -1], [3, -1, -1], [6, 7, 8]], dtype=torch.int32)
        slots = torch.zeros(9, dtype=torch.long)
        module.fill_accept_out_cache_loc_func(index, torch.arange(9) + 50, slots, 9)
        bonus = torch.empty(N, dtype=torch.int32)
        module.fill_bonus_tokens_func(torch.arange(9).int(), torch.tensor([2, 1, 3]), bonus, 3, N)
        both.append((slots, bonus))
    for module in (allocation, ours):
        written = table.clone()
        module.assign_req_to_token_pool_func(requests, written, start, end, torch.arange(7) + 200, N)
        both.append((written,))
    for (_, want), (_, actual) in zip(*[iter(enumerate(both))] * 2, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, want, strict=True))


def check_commit() -> None:
    class Caches:
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.temporal, self.conv = torch.randn(2, 6, 3, 4, 5), [torch.randn(2, 6, 7, 3)]
            self.intermediate_ssm, self.intermediate_conv_window = (
                torch.randn(2, N, 4, 3, 4, 5),
                [torch.randn(2, N, 4, 7, 3)],
            )

    slots, steps = torch.tensor([5, 1, 2], dtype=torch.int32), torch.tensor([3, 0, 2])
    track, track_steps = torch.tensor([0, 3, 4]), torch.tensor([-1, 0, 1])
    want, actual = Caches(), Caches()
    for caches, windows in ((want.temporal, want.intermediate_ssm), (want.conv[0], want.intermediate_conv_window[0])):
        for target, step in ((slots, steps), (track, track_steps)):
            for i in range(N):
                if step[i] >= 0:
                    caches[:, target[i]] = windows[:, i, step[i]]
    kernels.commit_states_after_verify(actual, slots, steps, track, track_steps)
    assert torch.equal(actual.temporal, want.temporal) and torch.equal(actual.conv[0], want.conv[0])


def check_sampling() -> None:
    """The first two tokens drawn through a tree are distributed as if there were none."""
    samples = 60_000
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25] * 4])
    # A root, two children, and a child of each: tokens 1 and 0 first, then 2 after 1, and 3 after 0.
    candidates = torch.tensor([[9, 1, 0, 2, 3]]).repeat(samples, 1)
    index = torch.arange(samples * 5).view(samples, 5)
    child, sibling = torch.tensor([[1, 3, 4, -1, -1]]), torch.tensor([[-1, 2, -1, -1, -1]])
    target = torch.stack([probs[0], probs[1], probs[2], probs[3], probs[3]]).repeat(samples, 1, 1)
    predicts = torch.zeros(samples * 5, dtype=torch.int32)
    accept_index, accepted = torch.full((samples, 3), -1, dtype=torch.int32), torch.empty(samples, dtype=torch.int32)
    ours.tree_speculative_sampling_target_only(
        predicts,
        accept_index,
        accepted,
        candidates.clamp(max=3),
        index,
        child.repeat(samples, 1),
        sibling.repeat(samples, 1),
        torch.rand(samples, 5),
        torch.rand(samples),
        target,
        torch.zeros_like(target),
    )
    first = predicts[accept_index[:, 0].long()]
    second = torch.where(accepted > 0, predicts[accept_index[:, 1].clamp(min=0).long()], -1)
    found = Counter(zip(first.tolist(), second.tolist(), strict=True))
    after = {1: probs[1], 0: probs[2]}
    for a, b in itertools.product(range(4), range(-1, 4)):
        if (a in after) != (b >= 0):
            assert found[a, b] == 0
            continue
        p = float(probs[0][a] * (after[a][b] if a in after else 1))
        assert abs(found[a, b] - p * samples) < 5 * (p * samples) ** 0.5, (a, b, found[a, b], p * samples)


def check_output_gate() -> None:
    """The kernel that gates attention's output takes a gate whose heads lie apart, and writes in place."""
    heads, size = 3, 20
    out, query_and_gate = torch.randn(5, heads * size), torch.randn(5, heads, 2, size)
    gate = query_and_gate[:, :, 1]
    want = out * gate.sigmoid().flatten(1)
    found = fused_sigmoid_mul(out, gate, inplace=True)
    assert found.data_ptr() == out.data_ptr()
    torch.testing.assert_close(found, want)


def check() -> None:
    """All of the above; needs ``TRITON_INTERPRET=1`` in the environment."""
    torch.manual_seed(0)
    check_trees()
    check_slots()
    check_commit()
    check_sampling()
    check_output_gate()
