"""Memory of the CPU's in large pages of the operating system's, where it has them.

Attention reads runs of 16 KiB all over a pool; with pages of 4 KiB each of them would first wait
for several addresses to be translated. And a large output is new to the process at each call: the
system hands it over page by page, which takes longer than most ops do.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch

#: Where parts of a pool fill up on their own, as layers do, a large page may stay unused at the end
#: of each: of smaller parts it would be too large a share.
LEAST_PART = 16 << 20
#: Smaller outputs are given the memory of earlier ones (glibc keeps what is freed up to this size).
LEAST_OUTPUT = 32 << 20


def empty_pool(shape: tuple[int, ...], *, parts: int = 1, **kind: Any) -> torch.Tensor:
    """``torch.empty``, of ``parts`` parts that fill up one by one. Asks, and goes on without."""
    pool = torch.empty(shape, **kind)
    if pool.device.type == "cpu" and pool.nbytes // parts >= LEAST_PART:
        _advise(pool.data_ptr(), pool.nbytes)
    return pool


def in_large_pages(output: torch.Tensor) -> torch.Tensor:
    """``output``, on the CPU and not written yet. Asks, and goes on without."""
    if output.nbytes > LEAST_OUTPUT:
        _advise(output.data_ptr(), output.nbytes)
    return output


def _advise(address: int, size: int) -> None:
    madvise = _madvise()
    if madvise is None:
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(first, last - first, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    """The C library's, or None on systems that do not have it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
