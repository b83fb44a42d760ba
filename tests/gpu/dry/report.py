"""What a dry run's record says: launches and copies by part of a layer and kind of batch."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from qnext_plugin.checkpoint.make_random import PRESETS

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


def summary(record: dict[str, Any], phases: dict[str, str]) -> dict[str, Any]:
    """Return what is kept of a start: what failed, and what each of ``phases`` (by a pattern) launches and copies."""
    shared = [kernel["shared"] for kernel in record["kernels"] if kernel["shared"] is not None]
    found = {name: of_phase(record["launches"], pattern) for name, pattern in phases.items()}
    return {
        "failure": record["failure"].strip().splitlines()[-1:],
        "served": record["served"],
        "kernels": len(record["kernels"]),
        "kernels that do not compile": sorted({kernel["name"] for kernel in record["kernels"] if kernel["error"]}),
        "largest shared memory": max(shared, default=0),
        "waits in graphs": sorted({event["kind"] for event in record["events"] if event["capturing"]}),
        "phases": {name: of_launches(launches) for name, launches in found.items() if launches},
    }


def of_launches(launches: list[Launch]) -> dict[str, Any]:
    """Return the launches and copies of a phase and of the first layer's parts, and on how many streams these are."""
    launches = [launch for launch in launches if launch["kind"] != "graph"]
    streams: dict[str, set[int]] = {}
    for launch in launches:
        place = layer_of(launch)
        if place is not None:
            streams.setdefault(place[1], set()).add(launch["stream"])
    found = {
        "launches": len(launches),
        "copies": sum(launch["kind"] in COPIES for launch in launches),
        "between ranks": sum(launch["kind"] == "nccl" or launch["name"].startswith("c10d") for launch in launches),
    }
    parts = {part: dict(each) | {"streams": len(streams[part])} for part, each in counts(launches).items()}
    return found | ({"in all layers": all_layers(launches), "parts": parts} if parts else {"parts": {}})


def all_layers(launches: Iterable[Launch]) -> int:
    """Return what 48 layers would launch, by the first DeltaNet layer and the first attention layer."""
    places = [re.match(r"model\.layers\.(\d+)", launch["module"]) for launch in launches]
    by_layer = Counter(place[1] if place else "" for place in places)
    layers, every = PRESETS["80b"]["num_hidden_layers"], PRESETS["80b"]["full_attention_interval"]
    attention = layers // every
    return by_layer[""] + (layers - attention) * by_layer["0"] + attention * by_layer[str(every - 1)]
