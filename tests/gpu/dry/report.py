"""What a dry run's record says: launches and copies by part of a layer and kind of batch."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

Launch = dict[str, Any]
COPIES = ("copy", "memcpy")
DELTA_NET, ATTENTION, EXPERTS = "linear_attn", "self_attn", "mlp"
PARTS = {DELTA_NET: "Gated DeltaNet", ATTENTION: "attention", EXPERTS: "experts"}


def layer_of(launch: Launch) -> tuple[int, str] | None:
    """Return the index of the trunk's layer that a launch belongs to and its part, or None for what is in no part."""
    found = re.match(r"model\.layers\.(\d+)\.(\w+)", launch["module"])
    return (int(found[1]), found[2]) if found and found[2] in PARTS else None


def of_phase(launches: Iterable[Launch], pattern: str) -> list[Launch]:
    """Return the launches of the first phase that ``pattern`` matches; of a captured one, those inside the graph."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        if re.search(pattern, launch["phase"]):
            found.setdefault(launch["phase"], []).append(launch)
    if not found:
        return []
    phase = next(iter(found.values()))
    captured = [launch for launch in phase if launch["capturing"]]
    return captured or phase


def counts(launches: Iterable[Launch]) -> dict[str, Counter[str]]:
    """Return by part the launches and copies of its first layer that has any."""
    found: dict[tuple[str, int], Counter[str]] = {}
    for launch in launches:
        place = layer_of(launch)
        if place is not None and launch["kind"] != "graph":
            index, part = place
            each = found.setdefault((part, index), Counter())
            each["launches"] += 1
            each["copies"] += launch["kind"] in COPIES
    first: dict[str, Counter[str]] = {}
    for (part, _), each in sorted(found.items(), key=lambda item: item[0][1]):
        first.setdefault(part, each)
    return first


def sequence(launches: Iterable[Launch], part: str) -> list[str]:
    """Return the names of what the first layer with such a part launches, in order."""
    in_part = [(layer_of(launch), launch) for launch in launches if launch["kind"] != "graph"]
    chosen = [(place[0], launch) for place, launch in in_part if place is not None and place[1] == part]
    return [f"{launch['kind']}: {launch['name']}" for index, launch in chosen if index == chosen[0][0]]
