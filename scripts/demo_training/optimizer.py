"""Muon and Adam, and how fast they learn when."""

from itertools import pairwise

import torch
from torch import Tensor

from demo_training.model import Weights

MATRIX_LR, OTHER_LR = 0.02, 4e-3
STEPS = 2250
# The learning rates' factor by step, linear in between. Weights decay only while it is high.
SCHEDULE = (
    (0, 0.0),
    (30, 1.0),
    (450, 1.0),
    (500, 0.952381),
    (500, 0.4),
    (1350, 0.157143),
    (1350, 0.2),
    (1550, 0.146667),
    (1550, 0.18),
    (STEPS, 0.0),
)
WEIGHT_DECAY, DECAY_UNTIL = 0.5, 500


class Optimizer:
    """Muon (Jordan et al., 2024: momentum, orthogonalized) for the matrices of the layers, Adam for everything else."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.state = {n: [torch.zeros_like(t) for _ in range(1 if _is_matrix(n, t) else 2)] for n, t in weights.items()}
        self.step_count = 0

    @torch.no_grad()
    def step(self) -> None:
        scale = learning_rate(self.step_count)
        weight_decay = WEIGHT_DECAY if self.step_count < DECAY_UNTIL else 0.0
        self.step_count += 1
        t = self.step_count
        norm = torch.stack([w.grad.norm() for w in self.weights.values() if w.grad is not None]).norm()
        clip = min(1.0, 1.0 / float(norm))
        for name, weight in self.weights.items():
            assert weight.grad is not None
            state = self.state[name]
            if len(state) == 1:
                state[0].lerp_(weight.grad, 0.05)
                update = _orthogonalized(torch.lerp(weight.grad, state[0], 0.95))
                size = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - weight_decay * scale * MATRIX_LR).sub_(update, alpha=scale * MATRIX_LR * size)
            else:
                grad = weight.grad * clip
                state[0].lerp_(grad, 0.1)
                state[1].lerp_(grad.square(), 0.02)
                update = state[0] / (1 - 0.9**t) / ((state[1] / (1 - 0.98**t)).sqrt() + 1e-10)
                weight.sub_(update, alpha=scale * OTHER_LR)
            weight.grad = None


def _is_matrix(name: str, tensor: Tensor) -> bool:
    module = name.split(".")[-2]
    return tensor.dim() >= 2 and module not in ("embed_tokens", "lm_head", "conv1d", "gate", "shared_expert_gate")


def _orthogonalized(x: Tensor) -> Tensor:
    """Newton-Schulz iterations towards the nearest semi-orthogonal matrix, with Muon's coefficients."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def learning_rate(step: int) -> float:
    """The factor of the step after ``step`` others."""
    step += step < SCHEDULE[1][0]  # the warm-up does not begin with zero
    (start, first), (end, last) = next((a, b) for a, b in pairwise(SCHEDULE) if a[0] <= step < b[0])
    return first + (last - first) * (step - start) / (end - start)
