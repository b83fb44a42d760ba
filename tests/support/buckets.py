"""A training process's weights, as it sends them to a server."""

import re

import torch

Weights = list[tuple[str, torch.Tensor]]


def transformers5(weights: Weights) -> Weights:
    """The same weights as a state dict of ``transformers`` 5 has them, with the experts of a layer in two tensors."""
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    others: Weights = []
    for name, tensor in weights:
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            others.append((name, tensor))
    for layer, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        gate_up = [torch.cat([parts[i, "gate_proj"], parts[i, "up_proj"]]) for i in numbers]
        others.append((f"{layer}.gate_up_proj", torch.stack(gate_up)))
        others.append((f"{layer}.down_proj", torch.stack([parts[i, "down_proj"] for i in numbers])))
    return sorted(others)


def buckets(weights: Weights, size: int) -> list[Weights]:
    """``weights`` in lists of up to ``size`` bytes, or of one tensor that is larger."""
    found: list[Weights] = []
    room = 0
    for name, tensor in weights:
        if not found or tensor.nbytes > room:
            found.append([])
            room = size
        found[-1].append((name, tensor))
        room -= tensor.nbytes
    return found
