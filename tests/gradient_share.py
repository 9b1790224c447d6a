"""What each process of ``test_processes_take_the_mean_gradient`` does; spawned ones import it."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny import workers


def share(rank: int, count: int, folder: Path) -> None:
    weights = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(5))]
    for p in weights:
        p.grad = torch.full_like(p, float(rank + 1))
    weights[1].grad[rank] = 10.0
    workers.mean_gradients(weights, count)
    workers.check_alike(weights, count)
    apart = [torch.nn.Parameter(torch.tensor([1.0, float(rank)]))]
    try:
        workers.check_alike(apart, count)
    except RuntimeError:
        torch.save([], folder / f"{rank}.apart")
    found = {"grads": [p.grad for p in weights], "total": workers.total(rank + 0.5, count)}
    torch.save(found, folder / f"{rank}.pt")
