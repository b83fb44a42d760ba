"""Trees of drafts, each as the parent of every token; what stands for the root's own is never read."""

# A chain longer than the convolution, branches at every depth, and a bush.
PARENTS = [[9, 0, 1, 2, 3, 4], [9, 0, 0, 1, 2, 4], [9, 0, 0, 0, 1, 1]]


def ancestors(parents: list[int], token: int) -> list[int]:
    """The way from the root to ``token``, both included."""
    return [*ancestors(parents, parents[token]), token] if token else [0]
