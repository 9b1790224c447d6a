"""Muon (Keller Jordan, 2024): momentum whose matrices are made orthogonal before the step.

torch's own does that in bfloat16, which most CPUs only emulate; here it is float32, with matrices
of one shape together. The step is scaled to the size of Adam's (arXiv 2502.16982, eq. 4), so that
both take the same learning rate and decay.
"""

from __future__ import annotations

from collections import defaultdict

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """For parameters with two dimensions."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(state["momentum"], group["momentum"])
                alike[tuple(sorted(p.shape))].append((p, nesterov))
            for pairs in alike.values():
                self._update(group, pairs)

    def _update(self, group: dict, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        tall = [update.shape[0] > update.shape[1] for _, update in pairs]
        stacked = torch.stack([u.T if t else u for (_, u), t in zip(pairs, tall)])
        whole = orthogonal(stacked)
        for (p, _), update, t in zip(pairs, whole, tall):
            scale = 0.2 * max(p.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.T if t else update, alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns], rows <= columns, with singular values brought near 1 (0.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x
