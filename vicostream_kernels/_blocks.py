"""What a stream remembers: blocks of pages, the table of chunk rows, and what was forgotten."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vicostream_kernels._pages import check_int
from vicostream_kernels.checks import check_choice

if TYPE_CHECKING:
    from vicostream_kernels._spill_file import Record
    from vicostream_kernels.cache import CacheStream

KINDS = ("sink", "chunk", "text")


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor built on the host; for CUDA it travels from pinned memory, without a sync."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def padded(lists: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    """Pages of one block a row, [len(lists), width] int32, -1 behind them."""
    rows = [[*pages, *[-1] * (width - len(pages))] for pages in lists]
    return to_device([page for row in rows for page in row], torch.int32, device).view(-1, width)


def check_reservation(
    bucket: int, kind: str, markers: Sequence[int], start_s: float, end_s: float
) -> None:
    """The argument checks of `CacheStream.reserve`; raises TypeError or ValueError."""
    check_int("reserve", "bucket", bucket, 0)
    check_choice("reserve", "kind", kind, KINDS)
    if not isinstance(markers, (tuple, list)) or len(markers) != 2:
        raise ValueError(f"reserve: markers={markers!r} must be (leading, trailing) counts")
    for which, n in zip(("leading", "trailing"), markers):
        check_int("reserve", f"markers ({which})", n, 0)
    if bucket + sum(markers) == 0:
        raise ValueError("reserve: bucket=0 with markers=(0, 0) reserves nothing")
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s <= end_s):
        raise ValueError(f"reserve: start_s={start_s}, end_s={end_s} must be finite and in order")


@dataclass(eq=False, slots=True)
class Segment:
    """A run of pages inside a block. ``fixed`` is its token count where that is known from the
    start (markers, which have pages of their own); None marks the body, whose count comes later."""

    pages: list[int]
    fixed: int | None = None


class _Referable:
    """Slots take weak references away; a long history has no memory for more than that."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False, slots=True)
class Block(_Referable):
    """One chunk, the system prompt ("sink"), or a question's text. Made by `CacheStream.reserve`.

    ``segments`` are leading markers, body, trailing markers, with no pages where there are none;
    ``tokens`` counts all three and is None until the commit. Times are seconds of the stream.
    ``pinned`` may be set by the user at any time: a pinned block is never evicted.
    """

    kind: str
    start_s: float
    end_s: float
    segments: tuple[Segment, Segment, Segment]
    pinned: bool
    bucket: int
    markers: tuple[int, int]
    tokens: int | None = None
    state: str = "reserved"  # then "committed", then "freed" | "evicted" | "rolled back" | "closed"
    _stream: CacheStream = field(default=None, repr=False)  # type: ignore[assignment]
    _ids: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _capacity: int | None = field(default=None, repr=False)  # body rows of the plan; None: no plan
    _planned: int | None = field(default=None, repr=False)  # the plan's count where the host has it
    _order: int = field(default=-1, repr=False)  # commit number, over all streams of the cache
    _number: int = field(default=-1, repr=False)  # of a chunk in its stream, from 0
    _holds: int = field(default=0, repr=False)
    _row: int = field(default=-1, repr=False)
    _summary: torch.Tensor | None = field(default=None, repr=False)  # waits for the row
    _summarised: bool = field(default=False, repr=False)
    _keeps: int = field(default=0, repr=False)  # users that want it to live, wherever it lies
    _away: bool = field(default=False, repr=False)  # it has no pages now: it lies below them
    _copy: Record | None = field(default=None, repr=False)  # what lies below, also of a block here

    @property
    def body(self) -> Segment:
        return self.segments[1]

    @property
    def body_tokens(self) -> int | None:
        """Tokens without the markers; None until the commit."""
        return None if self.tokens is None else self.tokens - sum(self.markers)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of each segment; after the commit."""
        return self.markers[0], self.body_tokens, self.markers[1]

    @property
    def tier(self) -> str:
        """Where a committed block lies: "device" ("memory" on the CPU), "host" or "disk"."""
        return self._stream.cache.tier(self)

    @property
    def pages(self) -> list[int]:
        """All page ids, in logical order; none while the block lies in a lower tier."""
        return [page for segment in self.segments for page in segment.pages]

    @property
    def row(self) -> int | None:
        """The row that `block_pages` and `summaries` have for this block now; None without one.

        Rows move up when older rows are dropped: read it together with the tables, not before.
        """
        return None if self._row < 0 else self._row - self._stream._table.start

    @property
    def body_ids(self) -> torch.Tensor:
        """Device ids of the body's pages, [n] int64."""
        before = len(self.segments[0].pages)
        return self._ids[before : before + len(self.body.pages)]

    def __str__(self) -> str:
        return f"{self.kind} block {self.start_s:g}-{self.end_s:g} s ({self.state})"


class BlockList(list):
    """A list of blocks in commit order.

    Iteration runs over a snapshot, so that ``for b in stream.chunks: stream.evict(b)`` reaches
    every block; slices are plain lists.
    """

    def __iter__(self) -> Iterator[Block]:
        return iter(self[:])

    def oldest_first(self) -> Iterator[Block]:
        """Iterates without a copy; for readers that change nothing while they iterate."""
        return super().__iter__()

    def drop(self, block: Block) -> None:
        """Removes a block that is listed; found by its commit number in O(log n)."""
        del self[bisect_left(self, block._order, key=lambda b: b._order)]


_SPANS_KEPT = 64


@dataclass
class Forgotten:
    """What was evicted: totals, and the time spans (s) of the last few; bounded by design.

    ``spans`` joins neighbours: while the oldest chunk goes first it has one entry. The newest 64
    are kept.
    """

    chunks: int = 0
    tokens: int = 0
    last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SPANS_KEPT))
    _runs: list[list[float]] = field(default_factory=list)  # first and last number, start, end

    @property
    def spans(self) -> list[tuple[float, float]]:
        return [(start, end) for _, _, start, end in self._runs]

    def add(self, block: Block) -> None:
        self.chunks += 1
        self.tokens += block.tokens or 0
        self.last.append((block.start_s, block.end_s))
        runs, n = self._runs, block._number
        at = bisect_left(runs, n, key=lambda run: run[0])
        run = [n, n, block.start_s, block.end_s]
        if at < len(runs) and runs[at][0] == n + 1:
            run = [n, runs[at][1], block.start_s, runs[at][3]]
            del runs[at]
        if at and runs[at - 1][1] == n - 1:
            runs[at - 1][1::2] = run[1::2]
        else:
            runs.insert(at, run)
            del runs[:-_SPANS_KEPT]


class BlockTable:
    """Rows of live chunks in time order: body pages [rows, M] int32 and summaries [rows, D] fp32.

    A commit writes one row in place. A dropped row is blanked at once and leaves the views: at the
    front by moving ``start``, elsewhere when the views are next read (a question, which scores
    every row anyway). A full table is rebuilt, twice as large if more than half of it lives, so a
    stream that forgets as fast as it sees keeps a table of bounded size, at O(1) a chunk amortised.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks = BlockList()
        self.start = self.end = 0
        self.pages = torch.full((0, 0), -1, dtype=torch.int32, device=device)
        self.vectors: torch.Tensor | None = None
        self.missing = 0  # live rows without a summary

    def add(self, block: Block, width: int) -> None:
        """Gives ``block`` the next row; ``width`` is the most body pages such a block can have."""
        rows, columns = self.pages.shape
        full = self.end == rows
        if full or width > columns:
            grown = max(16, 2 * rows) if full and 2 * len(self.blocks) >= rows else rows
            self._rebuild(grown, columns if width <= columns else max(width, 2 * columns))
        ids = block.body_ids
        block._row, self.end = self.end, self.end + 1
        self.pages[block._row, : len(ids)].copy_(ids)
        self.blocks.append(block)
        self.missing += 1
        if block._summary is not None:
            vector, block._summary = block._summary, None
            self._write(block, vector)

    def drop(self, block: Block) -> None:
        """Blanks the row of ``block``."""
        self.pages[block._row].fill_(-1)
        self.blocks.drop(block)
        self.missing -= not block._summarised
        block._row = -1
        self.start = self.blocks[0]._row if self.blocks else self.end

    def moved(self, blocks: Sequence[Block]) -> None:
        """The pages of ``blocks`` went, or others came."""
        if rows := [block._row for block in blocks if block._row >= 0]:
            lists = [block.body.pages for block in blocks if block._row >= 0]
            pages = padded(lists, self.pages.shape[1], self.device)
            self.pages.index_copy_(0, to_device(rows, torch.int64, self.device), pages)

    def set_summary(self, block: Block, vector: torch.Tensor) -> None:
        """Writes the row of ``block``, or keeps the vector until the block has a row."""
        if self.vectors is None:
            rows = len(self.pages)
            self.vectors = torch.zeros(rows, len(vector), device=self.device)
        if block._row < 0:
            block._summary = vector.detach().to(torch.float32, copy=True)
        else:
            self._write(block, vector)

    def compact(self) -> None:
        """Makes the rows of the views exactly the live blocks, in order."""
        if self.end - self.start != len(self.blocks):
            self._rebuild(*self.pages.shape)

    def _write(self, block: Block, vector: torch.Tensor) -> None:
        self.vectors[block._row].copy_(vector)
        self.missing -= not block._summarised
        block._summarised = True

    def _rebuild(self, rows: int, columns: int) -> None:
        live = to_device([b._row for b in self.blocks], torch.int64, self.device)
        n = len(self.blocks)
        pages = torch.full((rows, columns), -1, dtype=torch.int32, device=self.device)
        pages[:n, : self.pages.shape[1]] = self.pages.index_select(0, live)
        self.pages = pages
        if self.vectors is not None:
            vectors = torch.zeros(rows, self.vectors.shape[1], device=self.device)
            vectors[:n] = self.vectors.index_select(0, live)
            self.vectors = vectors
        for row, block in enumerate(self.blocks):
            block._row = row
        self.start, self.end = 0, n
