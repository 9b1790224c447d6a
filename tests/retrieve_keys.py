"""Keys in pages for the tests of retrieve."""

from __future__ import annotations

import torch

from kit import tensors


def paged_keys(dtype: torch.dtype, *, page_size: int = 5, seed: int = 0):
    """A pool with NaN in every slot that no token fills, blocks of 0 to 3 pages, a ragged table."""
    pages, heads, d = 11, 2, 8
    k_pages = tensors.randn((pages, page_size, heads, d), dtype, seed=seed)
    fill = tensors.ints((pages,), 1, page_size + 1, seed=seed + 1)
    fill[3] = 0
    for page in range(pages):
        k_pages[page, int(fill[page]) :] = torch.nan
    table = torch.tensor(
        [
            [[4, 2, -1], [-1, -1, -1], [0, 7, 9], [3, -1, -1]],
            [[10, -1, -1], [6, 99, 8], [-1, 1, -1], [3, 5, -1]],
        ],
        dtype=torch.int32,
    )
    return k_pages, tensors.strided(table), fill
