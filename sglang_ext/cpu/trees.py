"""Reads and links SGLang's trees of drafts.

With ``reconstruct_indices_from_tree_mask_func`` it stands for SGLang's module of that function, ``reconstruct_tree``.
"""

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


def link(parents: Tensor, next_token: Tensor, next_sibling: Tensor) -> None:
    """Write the links of trees of D tokens whose drafts have these ``parents`` [N, D - 1]; the links are -1 before."""
    sequences = torch.arange(len(parents))
    for i in range(parents.shape[1], 0, -1):  # backwards, so that siblings are in order
        parent = parents[:, i - 1]
        next_sibling[:, i] = next_token[sequences, parent]
        next_token[sequences, parent] = i


def reconstruct_indices_from_tree_mask_func(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Write links and positions of the trees in ``tree_mask`` [N * D * D], which tells which token sees which."""
    visible = tree_mask.view(batch_size, draft_token_num, draft_token_num)
    ancestors = visible.tril(-1)
    positions.copy_((verified_seq_len[:, None] + ancestors.sum(2)).flatten())
    retrieve_index.copy_(torch.arange(batch_size * draft_token_num).view_as(retrieve_index))
    for links in (retrieve_next_token, retrieve_next_sibling):
        links.fill_(-1)
    link((ancestors * torch.arange(draft_token_num)).amax(2)[:, 1:], retrieve_next_token, retrieve_next_sibling)
