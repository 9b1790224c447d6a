"""Where a block's tokens go: rows of an LLM step -> slots, pages -> fill. Device work, no sync,
but where noted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def runs_of(pages: Sequence[int], fills: Iterable[int], size: int) -> list[tuple[int, int]]:
    """Where the tokens of ``pages`` lie, in order: (first slot, tokens) of each run without gaps.
    ``fills``: tokens of each page. Host work."""
    runs: list[tuple[int, int]] = []
    end = -1
    for page, fill in zip(pages, fills):
        first = page * size
        if first == end:
            runs[-1] = (runs[-1][0], runs[-1][1] + fill)
        else:
            runs.append((first, fill))
        end = first + fill
    return runs


def fill_of(
    pages: int, size: int, tokens: torch.Tensor | int, device: torch.device
) -> torch.Tensor:
    """Valid slots, [pages] int32, of pages that hold ``tokens`` tokens one after another."""
    starts = torch.arange(pages, device=device) * size
    return (tokens - starts).clamp(0, size).to(torch.int32)


def slots_of(
    ids: torch.Tensor,
    size: int,
    rows: int,
    lead: int,
    body_pages: int,
    count: torch.Tensor | int,
    trail: int,
) -> torch.Tensor:
    """Slots [rows] int32 of ``lead`` markers, ``count`` body tokens, ``trail`` markers, then -1.

    ``ids`` [n] int64 are the pages of the three in this order, each starting on a page of its own;
    the body has ``body_pages`` of them whatever ``count`` (int or 0-d tensor) is.
    """
    row = torch.arange(rows, device=ids.device)
    lead_pages = -(-lead // size)
    # Row -> place in the block's padded token space (n pages x size) -> slot.
    place = row + (lead_pages * size - lead)
    place = torch.where(row < lead + count, place, place + (body_pages * size - count))
    if lead:
        place = torch.where(row < lead, row, place)
    place = place.clamp(max=len(ids) * size - 1)
    slots = ids[place // size] * size + place % size
    return torch.where(row < lead + trail + count, slots, -1).to(torch.int32)
