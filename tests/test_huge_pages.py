"""Large pools on the CPU ask for large pages."""

import sys
from pathlib import Path

import pytest
import torch

from vicostream_kernels._huge_pages import LEAST_PART, empty_pool
from vicostream_kernels.cache import PagedKVCache

_SMAPS = Path("/proc/self/smaps")
_HAS = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not _HAS.exists() or not _SMAPS.exists(),
    reason="this system has no transparent huge pages",
)


def _asked(tensor: torch.Tensor) -> bool:
    """Whether the mapping with the middle of a tensor is marked."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in _SMAPS.read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(x, 16) for x in name.split("-"))
            inside = first <= middle < last
        elif inside and name == "VmFlags:":
            return "hg" in rest
    raise AssertionError("the tensor lies in no mapping")


def test_large_pools_ask_and_small_ones_do_not() -> None:
    elements = LEAST_PART // 4
    assert _asked(empty_pool((2, elements), parts=2, dtype=torch.float32))
    assert not _asked(empty_pool((2, elements), parts=4, dtype=torch.float32))


def test_the_cache_asks_for_its_pools() -> None:
    pages = LEAST_PART // (16 * 2 * 128 * 4)
    for many, asked in ((pages, True), (pages // 2, False)):
        cache = PagedKVCache(
            layers=2, kv_heads=2, head_dim=128, page_size=16, pages=many, dtype=torch.float32
        )
        assert [_asked(pool) for pool in cache._pools.values()] == [asked, asked]
        cache.close()
