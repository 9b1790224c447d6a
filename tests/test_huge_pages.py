"""Large pools and outputs on the CPU ask for large pages."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vicostream_kernels as vk
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


def _append() -> torch.Tensor:
    tokens, pages = torch.randn(8, 2, 16), torch.zeros(1, 8, 2, 16)
    ids = torch.arange(8, dtype=torch.int32)
    return vk.rope_append(
        tokens,
        tokens,
        tokens,
        ids.expand(3, 8),
        torch.ones(8),
        None,
        pages,
        pages.clone(),
        ids,
        backend="cpu",
    )


def _prune() -> torch.Tensor:
    rule = vk.PruneRule(threshold=0.25)
    return vk.prune_tokens(
        torch.randn(2, 8, 16), torch.zeros(3, 2, 8, dtype=torch.int32), rule, backend="cpu"
    ).tokens


def _preprocess() -> torch.Tensor:
    frames = torch.zeros(2, 56, 56, 3, dtype=torch.uint8)
    kind = {"min_pixels": 1, "max_pixels": 10_000, "mean": [0.5] * 3, "std": [0.5] * 3}
    return vk.preprocess_frames(frames, **kind, backend="cpu")[0]


def _gather() -> torch.Tensor:
    return vk.gather_rows(
        torch.randn(1, 8, 64), torch.zeros(1, 4, dtype=torch.int32), backend="cpu"
    )


def _merge() -> torch.Tensor:
    rows, index = torch.randn(1, 4, 64), torch.arange(4, dtype=torch.int32)[None]
    return vk.merge_rows(torch.randn(1, 8, 64), rows, index, backend="cpu")


@pytest.mark.parametrize("run", [_append, _prune, _preprocess, _gather, _merge])
def test_only_large_outputs_ask(
    run: Callable[[], torch.Tensor], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = run().nbytes
    assert sizes == []
    monkeypatch.setattr(_huge_pages, "LEAST_OUTPUT", size - 1)
    run()
    assert sizes == [size]
