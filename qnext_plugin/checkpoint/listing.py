"""Shorten long lists of names: merge similar names and keep the first few."""

import re
from collections.abc import Iterable

_MAX_LISTED = 8


def listing(label: str, lines: list[str]) -> str:
    """Return ``label``, the number of lines and the first few, similar ones merged; empty if there are no lines."""
    if not lines:
        return ""
    patterns = collapse(lines)
    more = [f"and {len(patterns) - _MAX_LISTED} more patterns"] if len(patterns) > _MAX_LISTED else []
    return f"{label} {len(lines)}: " + "; ".join(patterns[:_MAX_LISTED] + more)


def collapse(names: Iterable[str]) -> list[str]:
    """Merge names that differ only in an index: ``layers.{0..2}.mlp.experts.{1,3..7}.up_proj.weight``."""
    patterns = list(names)
    for _ in range(2):  # experts, then layers
        groups: dict[tuple[str, str], list[int]] = {}
        for name in patterns:
            match = re.match(r"(.*\.)([0-9]{1,18})(\..*)", name)
            indices = groups.setdefault((match[1], match[3]) if match else (name, ""), [])
            if match:
                indices.append(int(match[2]))
        patterns = [before + _ranges(indices) + after for (before, after), indices in groups.items()]
    return patterns


def _ranges(indices: list[int]) -> str:
    if len(indices) < 2:
        return "".join(map(str, indices))
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"
