"""Processes that share a batch: each has part of the videos, and all take the mean gradient.

At these sizes most of a step is many small operations, and Python, which threads do not share.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(workers: int, job: Callable[..., Any], *args: Any) -> None:
    """``job(rank, workers, *args)`` in each of ``workers`` processes of one thread; in this one if
    there is one alone. Where one fails the others end too, and its error is raised."""
    if workers == 1:
        job(0, 1, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _begin, (workers, os.getpid(), str(Path(folder) / "meeting"), job, args), nprocs=workers
        )


def _begin(
    rank: int, workers: int, parent: int, meeting: str, job: Callable[..., Any], args: tuple
) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    try:
        job(rank, workers, *args)
    finally:
        dist.destroy_process_group()


def _end_with(parent: int) -> None:
    """Ends this process soon after the one that began it, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def mean_gradients(parameters: Iterable[torch.nn.Parameter], workers: int) -> None:
    """In place, in every process."""
    if workers == 1:
        return
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= workers
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def check_alike(parameters: Iterable[torch.nn.Parameter], workers: int) -> None:
    """Raises RuntimeError where the processes do not hold the same parameters, bit for bit."""
    if workers == 1:
        return
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in parameters])
    most, least = sums.clone(), sums.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if not torch.equal(most, least):
        raise RuntimeError("the processes hold different parameters")


def total(value: float, workers: int) -> float:
    """The sum over all processes."""
    if workers == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed)
