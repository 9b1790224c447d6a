"""Consecutive positions: what a question reads, moved so that it stands right before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vicostream_kernels._blocks import to_device
from vicostream_kernels.cache import Block
from vicostream_kernels.pipeline.visibility import History


class Rebase:
    """Shifts for ``sink_window_attention``'s ``page_shift``.

    Chunks keep their inside: a chunk moves as a whole, by the same number in t, h and w, to the ids
    right before those of the next chosen chunk, the last one to right before ``end``; what is
    always read (the system prompt) moves in front of the first. Rotary attention goes by
    differences of positions, so this is the same as counting everything from 0, and the question
    keeps its ids, whatever each layer or head has chosen.

    Args:
        always: blocks at the front, in order. chunks: the C chunks that may be chosen.
        prefix: [1, Ms], pages of ``always``. pages: [1, NB, M], pages of the candidate rows.
        chunk_of_row: [NB] int64, numbers in ``chunks``.
        end: the id after the last one that the last chosen chunk may take.
    """

    def __init__(
        self,
        history: History,
        always: Sequence[Block],
        chunks: Sequence[Block],
        prefix: torch.Tensor,
        pages: torch.Tensor,
        chunk_of_row: torch.Tensor,
        end: int,
    ) -> None:
        device, count = prefix.device, len(chunks)
        ids = [history.ids[block] for block in chunks]
        self._first = to_device(
            [first + b.markers[0] for (first, _), b in zip(ids, chunks)], torch.int64, device
        )
        self._span = to_device(
            [after - first - sum(b.markers) for (first, after), b in zip(ids, chunks)],
            torch.int64,
            device,
        )
        self._end = end
        self._front = history.ids[always[-1]][1] if always else 0
        # What each page belongs to: a chunk's number, C: nothing that moves, C + 1: the front.
        owner = torch.full((history.cache.cache.total_pages,), count, device=device)
        owner.index_fill_(0, prefix[0].long(), count + 1)
        known = pages[0] >= 0
        of_page = chunk_of_row.unsqueeze(1).expand_as(pages[0])
        # No masked assignment: its length would have to come to the host.
        spare = torch.cat((owner, owner[:1]))
        spare[pages[0].long().masked_fill(~known, len(owner))] = of_page
        self._owner = spare[:-1]

    def place(self, ids: torch.Tensor, chunk: torch.Tensor) -> None:
        """A chunk (its number, []) has its pages ``ids`` [n] int64 now."""
        self._owner[ids] = chunk

    def __call__(self, table: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        """[*table.shape, 3] int32 for ``table`` [1, (R,) L] and the ``chosen`` chunks [R, C]."""
        if chosen is None:
            chosen = self._span.new_zeros(1, len(self._span)).bool()
        spans = chosen * self._span
        behind = spans.flip(1).cumsum(1).flip(1)  # of a chunk and all chosen ones after it
        front = self._end - spans.sum(1, keepdim=True) - self._front
        still = torch.zeros_like(front)
        shifts = torch.cat((self._end - behind - self._first, still, front), dim=1)
        listed = table.view(-1, table.shape[-1])
        owner = self._owner[listed.clamp(min=0).long()]
        moved = shifts.gather(1, owner).masked_fill(listed < 0, 0)
        return moved.to(torch.int32).view(*table.shape, 1).repeat(*[1] * table.dim(), 3)
