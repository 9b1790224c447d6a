"""Which blocks have pages, within the memory budget; the rest lie below.

A chunk goes down when its pages are needed: the least recently retrieved first, never one that is
pinned, held or not committed. What was fetched again keeps its record below, so that going down a
second time costs nothing. Rows and summaries stay in memory as long as their block lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vicostream_kernels._below import Below
from vicostream_kernels._blocks import Block, to_device
from vicostream_kernels._pages import OutOfPages
from vicostream_kernels._placement import runs_of
from vicostream_kernels._spill_file import Group
from vicostream_kernels._tensor_file import raw
from vicostream_kernels._tiers import DiskFull, Tiers
from vicostream_kernels._transfer import PageBytes, Runs, Transfer

if TYPE_CHECKING:
    from vicostream_kernels.cache import CacheStream, PagedKVCache


class _Coming(NamedTuple):
    """A block that is on its way up: its pages, tokens in each, where these go, what holds them."""

    block: Block
    pages: list[int]
    fills: list[int]
    runs: Runs
    record: torch.Tensor | None  # on the host, to be copied; None: it is read into the pages
    into: Iterable[memoryview] | None  # where its file is read into, if it lies in one


class Residency:
    """Moves the blocks of one cache between its pages and what is below them."""

    def __init__(self, cache: PagedKVCache, tiers: Tiers) -> None:
        self.tiers, self._cache = tiers, cache
        self.transfer = Transfer(cache.device)
        self.below = Below(tiers, self.transfer)
        self._nowhere = torch.empty(0, dtype=torch.int64, device=cache.device)
        self._resident: dict[Block, None] = {}  # chunks with pages, least recently used first
        memory = "device" if self.transfer.on_gpu else "memory"
        host = "host" if tiers.host_bytes or self.transfer.on_gpu else memory
        self.names = (memory, host, "disk")

    # -- accounts --------------------------------------------------------------------------------

    def tier(self, block: Block) -> str:
        """Where a block is read from now."""
        if not block._away:
            return self.names[0]
        return self.names[2 if block._copy.group.buffer is None else 1]

    def bytes(self) -> dict[str, tuple[int, int | None]]:
        """(bytes, budget) of each tier; without a host tier, what is on its way to a file counts in
        memory."""
        self.below.reap()
        cache, tiers, below = self._cache, self.tiers, self.below
        memory = cache.bytes + cache.summary_bytes
        if not tiers.host_bytes:
            memory += below.buffer_bytes
        found: dict[str, tuple[int, int | None]] = {self.names[0]: (memory, tiers.memory_bytes)}
        if tiers.host_bytes:
            found["host"] = (below.buffer_bytes, tiers.host_bytes)
        if tiers.disk_bytes != 0:
            found["disk"] = (below.disk_bytes, tiers.disk_bytes)
        return found

    def headroom(self) -> int:
        """Pages that may be taken before something must go down; negative when over the budget."""
        cache = self._cache
        rows = max(self.tiers.reserve_bytes, cache.summary_bytes)
        allowed = (self.tiers.page_bytes - rows) // cache.bytes_per_page
        return min(cache.free_pages, allowed - cache.used_pages)

    # -- what the streams tell -------------------------------------------------------------------

    def joined(self, block: Block) -> None:
        """A chunk was committed; its row may have made the tables grow."""
        self._resident[block] = None
        try:
            self.make_room(0)
        except DiskFull:
            pass  # the next request for pages says so, before anything has changed

    def left(self, block: Block) -> None:
        """A block is gone for good."""
        self._resident.pop(block, None)
        if block._copy is not None:
            self.below.forget(block)

    # -- down ------------------------------------------------------------------------------------

    def make_room(self, n: int) -> int:
        """Sends chunks down until ``n`` pages may be taken. Returns how many will be missing, and
        sends nothing down where that is not 0 (with n = 0, what can go). Raises DiskFull."""
        self.below.reap()
        self._bound_summaries()
        short = n - self.headroom()
        if short <= 0:
            return 0
        victims, pages = self._victims(short)
        if pages >= short or n == 0:
            self.spill(victims)
        return max(short - pages, 0)

    def spill(self, blocks: Sequence[Block]) -> None:
        """Sends chunks down that have pages."""
        again, batch, size = [], [], 0
        for block in blocks:
            if block._copy is not None:
                again.append(block)
                continue
            more = block.tokens * self._cache.bytes_per_token
            if batch and size + more > self.tiers.group:
                self._leave(again)
                self._send_down(batch)
                again, batch, size = [], [], 0
            batch.append(block)
            size += more
        self._leave(again)
        if batch:
            self._send_down(batch)

    def _victims(self, short: int) -> tuple[list[Block], int]:
        """Chunks with ``short`` pages, or more to make a group full; and their number of pages."""
        victims, pages, size = [], 0, 0
        for block in self._resident:
            if block.pinned or block._holds or not block.pages:
                continue
            size += block.tokens * self._cache.bytes_per_token
            if pages >= short and size > self.tiers.group:
                break
            victims.append(block)
            pages += len(block.pages)
        return victims, pages

    def _send_down(self, blocks: Sequence[Block]) -> None:
        cache, group = self._cache, Group(self._cache.dtype)
        for block in blocks:
            group.add(block, cache._record_shape(block.tokens))
        group.seal()
        group.buffer = self.below.buffer(group.nbytes)
        pools = list(cache._pools.values())
        try:
            for block, record in group.records.items():
                self.transfer.down(pools, cache._runs(block), group.view(record))
            group.arrived = self.transfer.mark()
        except BaseException:
            self.below.give_back(group)
            raise
        for block, record in group.records.items():
            block._copy = record
        self._leave(blocks)
        self.below.take(group)

    def _leave(self, blocks: Sequence[Block]) -> None:
        """Gives the pages back; the records below are what is left."""
        if not blocks:
            return
        cache = self._cache
        for stream, own in _by_stream(blocks):
            stream._leave(own)
        cache._clear(torch.cat([block._ids for block in blocks]))
        for block in blocks:
            cache._give(block.pages, block)
            for segment in block.segments:
                segment.pages.clear()
            # One for all: a view would keep the memory of the ids that were.
            block._ids, block._away = self._nowhere, True
            del self._resident[block]
        for stream, own in _by_stream(blocks):
            stream._left(own)

    def _bound_summaries(self) -> None:
        """Rows outlive pages: the oldest blocks go before rows crowd out the pages. A table has up
        to four times the rows in use, so that it takes half the budget at most."""
        while self._cache.live_summary_bytes > self.tiers.page_bytes // 8:
            if self.below.drop_oldest():
                continue
            able = (b for b in self._resident if not b.pinned and not b._keeps)
            if (victim := next(able, None)) is None:
                break
            victim._stream._evict(victim)

    # -- up --------------------------------------------------------------------------------------

    def fetch(self, blocks: Sequence[Block], asked: str) -> None:
        """Gives pages to those of ``blocks`` that have none; all of them were retrieved now."""
        self.below.reap()
        absent = [block for block in dict.fromkeys(blocks) if block._away]
        if absent:
            # Room for some of them must not be made of others.
            for block in blocks:
                block._holds, block._keeps = block._holds + 1, block._keeps + 1
            try:
                self._bring(absent, asked)
            finally:
                for block in blocks:
                    block._holds, block._keeps = block._holds - 1, block._keeps - 1
        for block in blocks:
            self._used(block)

    def _bring(self, absent: Sequence[Block], asked: str) -> None:
        cache = self._cache
        n = sum(sum(map(cache.pages_for, block.counts)) for block in absent)
        if self.make_room(n):
            raise OutOfPages(cache._why_full(n, absent[0]._stream, asked))
        pools, coming = list(cache._pools.values()), []
        memory = None if self.transfer.on_gpu else PageBytes(pools)
        try:
            for block in absent:
                if block.state == "committed":  # not given up while room was made
                    coming.append(self._begin(block, memory))
            errors = self.below.read([(one.block, one.into) for one in coming])
        except BaseException:
            self._let_go(coming)
            raise
        first = next((i for i, error in enumerate(errors) if error is not None), len(errors))
        if not self.tiers.allow_missing:
            self._let_go(coming[first:])
            coming = coming[:first]
        failed = [one for one, error in zip(coming, errors) if error is not None]
        self._let_go(failed)
        here = [one for one, error in zip(coming, errors) if error is None]
        try:
            up = [(one.runs, one.record) for one in here if one.record is not None]
            self.transfer.up(pools, up)
        except BaseException:
            self._let_go(here)  # nobody may read pages that do not hold the block
            raise
        self._place(here)
        for one, error in zip(failed, filter(None, errors)):
            one.block._stream._lose(one.block, str(error))
        if first < len(errors) and not self.tiers.allow_missing:
            raise errors[first]

    def _begin(self, block: Block, memory: PageBytes | None) -> _Coming:
        """Takes the pages of a block that comes up. They count as empty until it is there."""
        cache, record, into = self._cache, self.below.resting(block), None
        if record is None and memory is None:
            record = self.below.room_for(block)
            into = [raw(record)]
        fills = cache._fills(block)
        pages = cache._pool.take(len(fills), block)
        runs = runs_of(pages, fills, cache.page_size)
        if record is None:
            into = memory.of(runs)
        return _Coming(block, pages, fills, runs, record, into)

    def _let_go(self, coming: Sequence[_Coming]) -> None:
        """Gives back the pages of blocks that stay below."""
        for one in reversed(coming):
            self._cache._give(one.pages, one.block)

    def _place(self, coming: Sequence[_Coming]) -> None:
        """Blocks are there, or on their way through the device: their pages are shown."""
        if not coming:
            return
        cache = self._cache
        ids = to_device([page for one in coming for page in one.pages], torch.int64, cache.device)
        fills = to_device([n for one in coming for n in one.fills], torch.int32, cache.device)
        cache._fill.index_copy_(0, ids, fills)
        for (block, pages, *_), own in zip(coming, ids.split([len(one.pages) for one in coming])):
            for segment, n in zip(block.segments, map(cache.pages_for, block.counts)):
                segment.pages, pages = pages[:n], pages[n:]
            # Its own: a view would keep the memory of the others' ids as long as any of them.
            block._ids, block._away = own.clone(), False
            self._resident[block] = None
        for stream, own in _by_stream([one.block for one in coming]):
            stream._came(own)

    def _used(self, block: Block) -> None:
        if block in self._resident:
            del self._resident[block]
            self._resident[block] = None
        if block._copy is not None:
            self.below.used(block._copy.group)

    def close(self) -> None:
        self.transfer.settle()  # the pools may be somebody else's memory next
        self._resident.clear()
        self.below.close()


def _by_stream(blocks: Sequence[Block]) -> Iterable[tuple[CacheStream, list[Block]]]:
    found: dict[CacheStream, list[Block]] = {}
    for block in blocks:
        found.setdefault(block._stream, []).append(block)
    return found.items()
