"""Large pools on the CPU ask for large pages."""

import sys
from pathlib import Path

import pytest
import torch

from vicostream_kernels import _huge_pages
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


def test_large_pools_ask() -> None:
    assert _asked(empty_pool((2, LEAST_PART // 4), parts=2, dtype=torch.float32))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the pools that ask. Memory that a small one gets may have been marked for another."""
    found: list[int] = []
    monkeypatch.setattr(_huge_pages, "_advise", lambda _, size: found.append(size))
    return found


def test_small_parts_do_not_ask(sizes: list[int]) -> None:
    empty_pool((2, LEAST_PART // 4), parts=3, dtype=torch.float32)
    assert sizes == []
    empty_pool((2, LEAST_PART // 4), parts=2, dtype=torch.float32)
    assert sizes == [2 * LEAST_PART]


def test_the_cache_asks_for_its_pools(sizes: list[int]) -> None:
    pages = LEAST_PART // (16 * 2 * 128 * 4)
    kind = {"kv_heads": 2, "head_dim": 128, "page_size": 16, "dtype": torch.float32}
    for many, asked in ((pages // 2, []), (pages, [2 * LEAST_PART] * 2)):
        PagedKVCache(layers=2, pages=many, **kind).close()
        assert sizes == asked
