"""Reads SGLang's trees of drafts."""

import torch
from torch import Tensor


def tree_parents(next_token: Tensor, next_sibling: Tensor) -> Tensor:
    """Return each token's parent in SGLang's trees of drafts; the root's parent is 0.

    The links name a token's first child and next sibling, or are -1. All tensors are [N, D].
    """
    num_tokens = next_token.shape[1]
    parents = next_token.new_zeros(len(next_token), num_tokens + 1)  # the last column receives links to nothing
    child, sibling = (torch.where(link < 0, num_tokens, link) for link in (next_token, next_sibling))
    for i in range(num_tokens):
        here = slice(i, i + 1)
        parents.scatter_(1, child[:, here], i).scatter_(1, sibling[:, here], parents[:, here].clone())
    return parents[:, :num_tokens]
