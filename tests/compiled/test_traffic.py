"""What kernels ask of memory: that it is counted rightly, and that ours ask for nothing twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import traffic

from kit import emulation, interpreter
from vicostream_kernels import PruneRule, gather_rows, prune_tokens, select_changed

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "width", "cost", "least"),
    (
        (4 * LANES, 4, 4, 4),
        (4 * LANES + 4, 4, 5, 4),  # begins in the middle of a sector
        (16 * LANES, 16, 16, 16),
        (32 * LANES, 4, 32, 4),
        (0 * LANES, 4, 1, 1),
    ),
)
def test_sectors(addresses, width, cost, least):
    assert traffic.sectors(addresses, width, LANES) == (cost, least)
    # Another warp asks for itself.
    both, threads = np.concatenate([addresses, addresses]), np.arange(64)
    assert traffic.sectors(both, width, threads) == (2 * cost, 2 * least)


@pytest.mark.parametrize(
    ("addresses", "width", "cost", "least"),
    (
        (4 * LANES, 4, 1, 1),
        (8 * LANES, 4, 2, 1),
        (128 * LANES, 4, 32, 1),
        (0 * LANES, 4, 1, 1),
        (8 * LANES, 8, 2, 2),
        (16 * LANES, 16, 4, 4),
        (32 * LANES, 16, 8, 4),
        (2 * LANES, 2, 1, 1),
    ),
)
def test_passes(addresses, width, cost, least):
    assert traffic.passes(addresses, width, LANES) == (cost, least)


def test_a_quarter_of_a_warp_is_one_by_its_lanes():
    few = np.array([0, 8, 16, 24])
    assert traffic.passes(0 * few + 16, 16, few) == (4, 4)


def _chunk(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 9, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)


def _prune() -> None:
    x = _chunk(torch.bfloat16)
    positions = torch.zeros(3, 4, 9, dtype=torch.int32)
    rule = PruneRule(threshold=0.25, reduce="any", always_keep="first")
    prune_tokens(x, positions, rule, backend="triton")


def _reuse() -> None:
    x = _chunk(torch.bfloat16)
    index = select_changed(x, x.flip(1), ratio=0.5, backend="triton").index
    gather_rows(x, index, backend="triton")


@pytest.mark.skipif(
    interpreter.ACTIVE or emulation.ACTIVE or torch.cuda.is_available(),
    reason="what is compiled here runs in an ordinary process without a GPU",
)
@pytest.mark.parametrize("call", (_prune, _reuse))
def test_rows_are_read_and_written_whole(call):
    pytest.importorskip("triton")
    from ptx import triton_driver

    with triton_driver.compiled_for(90), traffic.counted() as counts:
        call()
    moving = ("score_kernel", "compact_kernel", "similarity_kernel", "gather_kernel")
    seen = [name for name in counts.kernels if name in moving]
    assert len(seen) == 2
    for name in seen:
        for space in ("load", "store", "shared"):
            total = counts.kernels[name].total(space)
            assert total.cost <= 1.05 * total.least, f"{name}:\n{counts.report()}"
