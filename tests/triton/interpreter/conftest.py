"""What the interpreter's tests share."""

from __future__ import annotations

import random

import pytest


@pytest.fixture
def shuffled_programs(monkeypatch):
    """The programs of every grid run in another order, as they may on a device.

    Returns the programs that ran, (x, y, z) each, in that order.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []
    ran: list[tuple[int, int, int]] = []

    def set_grid_dim(nx, ny, nz):
        order[:] = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        random.Random(len(order)).shuffle(order)
        set_dim(nx, ny, nz)

    def set_grid_idx(x, y, z):
        _, ny, nz = builder.grid_dim
        ran.append(order[(x * ny + y) * nz + z])
        set_idx(*ran[-1])

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    return ran
