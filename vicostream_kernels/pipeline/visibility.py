"""What new tokens of a stream may see: lists of blocks, and how far a token window reaches back.

A video chunk sees what its method's window covers. A question is a fork: it sees of the chunks
that ended at or before its time, either those that retrieval selects, or all that is kept. Nothing
here touches keys or values: the result is a page table and four numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vicostream_kernels.cache import Block, CacheStream
from vicostream_kernels.methods import Method
from vicostream_kernels.models.text import PageChoice


@dataclass(frozen=True)
class View:
    """What some new tokens see besides themselves.

    table: [1, L] int32, pages in logical order.
    blocks: the blocks behind the table, to be held while it is in use.
    spans: (start_s, end_s) of the chunks among them.
    window_start: first logical position that is visible after the sinks; None: all listed.
    sink_tokens: logical tokens at the start that no window hides.
    sink_pages, sink_shift: the first pages of the table are sinks whose ids are moved by this much.
    choice: layers choose their pages themselves; the table is not read then.
    shift: [*table.shape, 3] int32, by how much each page of the table has moved.
    windowed: the method's window in tokens applies; else everything that is listed is visible.
    """

    table: torch.Tensor
    blocks: tuple[Block, ...]
    spans: tuple[tuple[float, float], ...]
    window_start: int | None = None
    sink_tokens: int = 0
    sink_pages: int = 0
    sink_shift: int = 0
    choice: PageChoice | None = None
    shift: torch.Tensor | None = None
    windowed: bool = True


@dataclass
class History:
    """The blocks of one stream by their part in it, and the position ids that they took.

    ``sink`` is the part of the system prompt that stays visible for good, ``preamble`` the rest
    of it; either may be missing. ``ids`` maps a block to its first id and the id after its last.
    """

    cache: CacheStream
    sink: Block | None = None
    preamble: Block | None = None
    ids: WeakKeyDictionary[Block, tuple[int, int]] = field(default_factory=WeakKeyDictionary)
    next_id: int = 0
    chunks_seen: int = 0
    _holds: Counter[Block] = field(default_factory=Counter)
    _retired: list[Block] = field(default_factory=list)
    #: What open answers hold blocks with: not the garbage collector's, who lets go at any moment.
    _kept: set[Any] = field(default_factory=set)

    def add(self, block: Block, first: int, after: int) -> None:
        """Notes that ``block`` took the ids from ``first`` up to, not including, ``after``."""
        self.ids[block] = (first, after)
        self.next_id = after

    def chunks(self, time_s: float = float("inf")) -> list[Block]:
        """The chunks that ended at or before ``time_s``, in time order, but for those that are
        there for an open answer alone."""
        chunks = self.cache.chunks[:]
        if self._retired:
            gone = set(self._retired)
            chunks = [block for block in chunks if block not in gone]
        while chunks and chunks[-1].end_s > time_s:
            chunks.pop()
        return chunks

    def fork_id(self, time_s: float) -> int:
        """The id after the largest one of what a fork at ``time_s`` could see."""
        later = self.chunks()[len(self.chunks(time_s)) :]
        return self.ids[later[0]][0] if later else self.next_id

    @contextmanager
    def hold(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Keeps ``blocks`` while an answer reads them, also those that the window leaves."""
        with self.cache.hold(blocks):
            self._holds.update(blocks)
            try:
                yield
            finally:
                self._holds -= Counter(blocks)
        if not self.cache.closed:
            self._free_retired()

    def retire(self, visible: Sequence[Block]) -> None:
        """Frees all blocks after the sink that are not ``visible`` any more and will never be;
        those that an answer holds go when it lets them go."""
        gone = self._leaving(visible)
        if self.preamble in gone:
            self.preamble = None
        self._retired += gone
        self._free_retired()

    def spare_pages(self, visible: Sequence[Block]) -> int:
        """How many pages ``retire`` gives back at once."""
        return sum(len(b.pages) for b in self._leaving(visible) if not self._holds[b])

    def _leaving(self, visible: Sequence[Block]) -> list[Block]:
        seen = {*visible, *self._retired}
        preamble = [] if self.preamble is None else [self.preamble]
        return [block for block in (*self.chunks(), *preamble) if block not in seen]

    def _free_retired(self) -> None:
        waiting = []
        for block in self._retired:
            if self._holds[block]:
                waiting.append(block)
            elif block.kind == "chunk":
                block.pinned = False
                self.cache.evict(block)
            else:
                self.cache.free(block)
        self._retired = waiting


@dataclass(frozen=True)
class Window:
    """Blocks in logical order after the sink, with the number of their first tokens that are out
    of the token window."""

    blocks: tuple[Block, ...]
    hidden: int = 0


def chunk_window(method: Method, history: History, new_tokens: int) -> Window:
    """What the next chunk of ``new_tokens`` tokens (markers included) sees after the sink."""
    reach = method.engine.window_chunks
    # The system prompt was a forward of its own, the first of those that the window counts; without
    # a window of chunks the first one sees it all the same.
    shown = (
        method.engine.system_prompt == "always"
        or reach is None
        or history.chunks_seen < max(reach, 1)
    )
    return _cut(
        method, history.preamble if shown else None, history.cache.chunks, reach, new_tokens
    )


def question_window(
    method: Method, preamble: Block | None, chunks: Sequence[Block], new_tokens: int
) -> Window:
    """What a question of ``new_tokens`` tokens sees after the sink, without retrieval: all that the
    method keeps, the last window included. ``preamble`` and ``chunks`` are the history's at the
    fork: video that comes later may retire them."""
    reach = method.engine.window_chunks
    reach = None if method.engine.history == "all" or reach is None else reach + 1
    return _cut(method, preamble, chunks, reach, new_tokens)


def _cut(
    method: Method,
    preamble: Block | None,
    chunks: Sequence[Block],
    reach: int | None,
    new_tokens: int,
) -> Window:
    """The newest of ``chunks`` within ``reach`` chunks, behind the ``preamble``, or within the
    method's window in tokens, of which the new ones take their part: whole blocks drop out."""
    size = method.attention.window
    room = None if size is None else max(0, size - new_tokens)
    # Slices of bounded length where there is a window: a chunk's cost must not grow with the
    # history. A block has a token at least.
    longest = reach if room is None else room
    newest = chunks[0 if longest is None else max(0, len(chunks) - longest) :]
    blocks = ([] if preamble is None else [preamble]) + newest
    if room is None:
        return Window(tuple(blocks))
    first = len(blocks)
    while first and room > 0:
        first -= 1
        room -= blocks[first].tokens
    return Window(tuple(blocks[first:]), max(0, -room))


def window_view(method: Method, history: History, window: Window, next_id: int) -> View:
    """The view of ``window`` behind the sink, for new tokens whose ids start at ``next_id``."""
    sink = history.sink
    blocks = ((sink,) if sink is not None else ()) + window.blocks
    start = None
    if window.hidden:
        start = window.hidden + (sink.tokens if sink is not None else 0)
    shift = 0
    if method.attention.positions == "cache" and sink is not None:
        # Right before the first block that the window still touches: the ids within a block are
        # the device's, so that of its first visible token is not known here.
        origin = history.ids[window.blocks[0]][0] if window.blocks else next_id
        shift = origin - history.ids[sink][1]
    return View(
        table=history.cache.page_table(blocks),
        blocks=blocks,
        spans=_spans(window.blocks),
        window_start=start,
        sink_tokens=0 if sink is None else sink.tokens,
        sink_pages=len(sink.pages) if sink is not None and shift else 0,
        sink_shift=shift,
    )


def _spans(blocks: Sequence[Block]) -> tuple[tuple[float, float], ...]:
    return tuple((b.start_s, b.end_s) for b in blocks if b.kind == "chunk")
