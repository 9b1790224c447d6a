"""How the blocks of one stream come, grow and go: the half of a `CacheStream` that takes pages and
gives them back. The other half, in `_stream`, reads and moves what lives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from vicostream_kernels import checks
from vicostream_kernels._blocks import (
    Block,
    BlockList,
    BlockTable,
    Forgotten,
    Segment,
    check_reservation,
    to_device,
)
from vicostream_kernels._pages import CacheClosed, DoubleFree, ForeignStream, StaleBlock, check_int
from vicostream_kernels._placement import fill_of, slots_of
from vicostream_kernels._summaries import KeyRows
from vicostream_kernels._tiers import Loss

if TYPE_CHECKING:
    from vicostream_kernels.cache import PagedKVCache


def _asked(kind: str, bucket: int, markers: tuple[int, int]) -> str:
    return f"reserve({kind}, bucket={bucket}, markers={markers})"


class StreamLife:
    """A stream's state, the life of its blocks, and the guards of every call; see `CacheStream`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.blocks = BlockList()
        self.chunks = BlockList()
        self.sinks = BlockList()
        self.forgotten = Forgotten()
        self.losses: deque[Loss] = deque(maxlen=1024)
        self.chunks_seen = 0
        self.tokens = 0
        self.closed = False
        self._reserved: dict[Block, None] = {}
        self._table = BlockTable(cache.device)
        self.keys: KeyRows | None = None

    # -- a block comes ---------------------------------------------------------------------------

    def reserve(
        self,
        bucket: int,
        *,
        kind: str = "chunk",
        markers: tuple[int, int] = (0, 0),
        start_s: float = 0.0,
        end_s: float = 0.0,
        pinned: bool = False,
    ) -> Block:
        """Takes pages for at most ``bucket`` body tokens plus exact numbers of marker tokens.

        ``kind`` is "chunk" (of the stream; may be evicted and summarised), "sink" (always visible,
        always pinned) or "text" (a question and its answer; the one that `append_tokens` grows).
        ``start_s`` and ``end_s`` date it. Body and markers get pages of their own:
        ceil(n / page_size) each. When the pool is short it grows or evicts, as the cache was told;
        victims are the oldest unpinned committed chunks, of this stream first. Reserve before
        `page_table`: the victims may be in the table otherwise.

        Raises:
            OutOfPages: nothing (more) may grow or go; nothing has been evicted then.
            TypeError, ValueError: a bad argument.
        """
        self._check_open()
        check_reservation(bucket, kind, markers, start_s, end_s)
        lead, trail = markers
        segments = Segment([], lead), Segment([]), Segment([], trail)
        times = float(start_s), float(end_s)
        pinned = pinned or kind == "sink"
        block = Block(kind, *times, segments, pinned, bucket, (lead, trail), _stream=self)
        counts = [self.cache.pages_for(n) for n in (lead, bucket, trail)]
        asked = _asked(kind, bucket, block.markers)
        with self._taking(block):
            pages = self.cache._take(sum(counts), block, asked)
            block._ids = to_device(pages, torch.int64, self.cache.device)
            for segment, n in zip(segments, counts):
                segment.pages, pages = pages[:n], pages[n:]
            if self.keys is not None and kind == "chunk":
                self.keys.reserve(block)
            self._reserved[block] = None
        return block

    def make_room(self, bucket: int, *, markers: tuple[int, int] = (0, 0), spare: int = 0) -> None:
        """Has the pages free that `reserve` takes for such a chunk, but for ``spare`` that the
        caller gives back before that: what a chunk replaces is not gone when there is no room for
        it. Raises as `reserve` does."""
        self._check_open()
        check_reservation(bucket, "chunk", markers, 0.0, 0.0)
        check_int("make_room", "spare", spare, 0)
        n = sum(map(self.cache.pages_for, (markers[0], bucket, markers[1])))
        self.cache._free(n - spare, self, _asked("chunk", bucket, markers))

    @contextmanager
    def _taking(self, block: Block) -> Iterator[None]:
        """Gives back the pages that a block has taken where something fails before it is known to
        have them: memory that there is not, Ctrl-C."""
        before = list(block.body.pages)
        try:
            yield
        except BaseException:
            try:
                if block.state == "reserved" and self.keys is not None and block.kind == "chunk":
                    self.keys.drop(block)
            finally:
                if block.state == "reserved":
                    self._reserved.pop(block, None)
                    for segment in block.segments:
                        segment.pages.clear()
                    block.state = "rolled back"
                else:
                    block.body.pages[:] = before
                known = set(block.pages)
                taken = [page for page in self.cache._pool.of(block) if page not in known]
                self.cache._give(taken, block)
            raise

    def plan(self, block: Block, count: torch.Tensor | int, rows: int) -> torch.Tensor:
        """Places the block's tokens, on the device: no sync, no shape that depends on ``count``.

        Args:
            block: reserved, not committed. A later plan replaces an earlier one.
            count: body tokens, int32 or int64 tensor of one element on the cache's device, or an
                int. A tensor beyond the room (bucket, or rows less the markers) counts as the room.
            rows: length of the result, the padded rows of the LLM step; at least the markers.

        Returns:
            slots [rows] int32, page * page_size + offset. Row order: leading markers, ``count``
            body tokens, trailing markers, then -1. ``page_fill`` of the block's pages is written.
        """
        self._require(block, "plan", ("reserved",))
        lead, trail = block.markers
        check_int("plan", "rows", rows, lead + trail)
        room = min(block.bucket, rows - lead - trail)
        device = self.cache.device
        if isinstance(count, torch.Tensor):
            checks.check_dtype("plan", "count", count, (torch.int32, torch.int64))
            if count.numel() != 1 or count.device != device:
                raise ValueError(
                    f"plan: count must be one element on {device}, got shape "
                    f"{tuple(count.shape)} on {count.device}"
                )
            block._planned = None
            count = count.reshape(()).clamp(0, room)
        else:
            block._planned = check_int("plan", "count", count, 0, room)
        block._capacity = room

        cache, first = self.cache, 0
        for segment in block.segments:
            if not segment.pages:
                continue
            last = first + len(segment.pages)
            tokens = count if segment.fixed is None else segment.fixed
            fill = fill_of(last - first, cache.page_size, tokens, cache.device)
            cache.page_fill.index_copy_(0, block._ids[first:last], fill)
            first = last
        body_pages = len(block.body.pages)
        return slots_of(block._ids, cache.page_size, rows, lead, body_pages, count, trail)

    def commit(self, block: Block, count: int) -> None:
        """The planned count has reached the host: records it and gives unused body pages back.

        The block joins `blocks`; a chunk with body tokens gets the next row of `block_pages`. With
        VICO_CHECK=1 the count is compared to what the device planned.
        """
        self._require(block, "commit", ("reserved",))
        if block._capacity is None:
            raise ValueError(f"commit: block must be planned first, got {block}")
        check_int("commit", "count", count, 0, block._capacity)
        tokens = count + sum(block.markers)
        planned = None if block._planned is None else block._planned + sum(block.markers)
        if checks.CHECK_VALUES:
            planned = int(self.cache.page_fill[block._ids].sum())
        if planned not in (None, tokens):
            raise ValueError(
                f"commit: count={count} (with markers {tokens} tokens), the plan placed {planned}"
            )
        cache, body = self.cache, block.body
        keep = cache.pages_for(count)
        if unused := body.pages[keep:]:
            first = cache.pages_for(block.markers[0]) + keep
            last = first + len(unused)
            cache._give(unused, block)
            cache._clear(block._ids[first:last])
            del body.pages[keep:]
            if self.keys is not None and block.kind == "chunk":
                self.keys.trim(block, block._ids[first:last])
            block._ids = torch.cat((block._ids[:first], block._ids[last:]))
        block.tokens, block.state, block._order = tokens, "committed", cache._next_order()
        del self._reserved[block]
        self.tokens += tokens
        self.blocks.append(block)
        if block.kind == "sink":
            self.sinks.append(block)
        elif block.kind == "chunk":
            block._number, self.chunks_seen = self.chunks_seen, self.chunks_seen + 1
            self.chunks.append(block)
            if count:
                self._table.add(block, cache.pages_for(block.bucket))
            else:
                block._summary = None
            if cache._residency is not None:
                cache._residency.joined(block)

    def append_tokens(self, block: Block, n: int = 1) -> torch.Tensor:
        """Grows a committed text block by ``n`` tokens (decode); takes pages when it must.

        Returns:
            slots [n] int32. ``page_fill`` is written. No sync; ``n=1`` copies nothing to the
            device unless a page is taken.

        Raises:
            OutOfPages: as `reserve`; the block is as it was.
            ValueError: not a text block, or one with trailing markers.
        """
        self._require(block, "append_tokens", ("committed",))
        check_int("append_tokens", "n", n, 1)
        if block.kind != "text" or block.markers[1]:
            raise ValueError(
                f"append_tokens: block must be a text block without trailing markers, "
                f"got {block} with markers={block.markers}"
            )
        cache, size, pages = self.cache, self.cache.page_size, block.body.pages
        old = block.body_tokens
        new = old + n
        missing = cache.pages_for(new) - len(pages)
        if missing > 0:
            with self._taking(block):
                taken = cache._take(missing, block, f"append_tokens(n={n})")
                ids = torch.cat((block._ids, to_device(taken, torch.int64, cache.device)))
                pages.extend(taken)
                block._ids = ids
        for p in range(old // size, cache.pages_for(new)):
            # Host scalars reach the device as kernel arguments: nothing is copied.
            cache.page_fill[pages[p] : pages[p] + 1].fill_(min(new - p * size, size))
        block.tokens += n
        self.tokens += n
        slots = [pages[i // size] * size + i % size for i in range(old, new)]
        if n == 1:
            return torch.full((1,), slots[0], dtype=torch.int32, device=cache.device)
        return to_device(slots, torch.int32, cache.device)

    # -- a block goes ----------------------------------------------------------------------------

    def evict(self, block: Block) -> None:
        """Forgets a committed chunk, and counts it in `forgotten`. ValueError when it is pinned or
        held."""
        self._require(block, "evict", ("committed",), giving_back=True)
        if block.kind != "chunk":
            raise ValueError(f"evict: block must be a chunk (free gives others back), got {block}")
        if block.pinned:
            raise ValueError(f"evict: {block} is pinned; unpin it first")
        self._check_not_held("evict", block)
        self._evict(block)

    def free(self, block: Block) -> None:
        """Gives back a committed block whose user is done with it (a question's text, a sink)."""
        self._require(block, "free", ("committed",), giving_back=True)
        self._check_not_held("free", block)
        self._drop(block, "freed")

    def rollback(self, block: Block) -> None:
        """Abandons a block that is not committed; all its pages go back."""
        self._require(block, "rollback", ("reserved",), giving_back=True)
        del self._reserved[block]
        if self.keys is not None:
            self.keys.drop(block)
        self.cache._clear(block._ids)
        self._release(block, "rolled back")

    def close(self) -> None:
        """Gives everything back, pinned, held or reserved; a second close does nothing."""
        if self.closed:
            return
        if going := [*self.blocks, *self._reserved]:
            # One device call for all: a long history would take thousands.
            self.cache._clear(torch.cat([block._ids for block in going]))
        for block in going:
            self._release(block, "closed")
        for page, owner in self.cache._pool.owners():  # what an interrupt left without a list
            if isinstance(owner, Block) and owner._stream is self:
                self.cache._give([page], owner)
        self.blocks.clear()
        self.chunks.clear()
        self.sinks.clear()
        self._reserved.clear()
        self.tokens = 0
        self._table, self.keys = BlockTable(self.cache.device), None
        self.closed = True
        self.cache._streams.pop(self, None)

    # -- within the cache ------------------------------------------------------------------------

    def _evict(self, block: Block) -> None:
        self._drop(block, "evicted")
        self.forgotten.add(block)

    def _drop(self, block: Block, state: str) -> None:
        self.blocks.drop(block)
        if block.kind == "sink":
            self.sinks.drop(block)
        elif block.kind == "chunk":
            self.chunks.drop(block)
            if block._row >= 0:
                self._table.drop(block)
            if self.keys is not None:
                self.keys.drop(block)
        self.tokens -= block.tokens
        self.cache._clear(block._ids)
        self._release(block, state)

    def _lose(self, block: Block, why: str) -> None:
        """A block whose tier failed is forgotten, and said to be."""
        self.losses.append(Loss(block.start_s, block.end_s, why))
        self._evict(block)

    def _leave(self, blocks: Sequence[Block]) -> None:
        """Blocks are about to give their pages back and live on in a lower tier."""
        if self.keys is not None:
            self.keys.left(blocks)

    def _left(self, blocks: Sequence[Block]) -> None:
        """The blocks have no pages now."""
        self._table.moved(blocks)

    def _came(self, blocks: Sequence[Block]) -> None:
        """The blocks have pages again."""
        self._table.moved(blocks)
        if self.keys is not None:
            self.keys.came(blocks)

    def _release(self, block: Block, state: str) -> None:
        if self.cache._residency is not None:
            self.cache._residency.left(block)
        self.cache._give(block.pages, block)
        for segment in block.segments:
            segment.pages.clear()
        block._ids, block._summary, block._row = block._ids[:0], None, -1
        block.state = state

    def _check_open(self) -> None:
        self.cache._check_open()
        if self.closed:
            raise CacheClosed("the stream was closed")

    def _require(
        self, block: Block, call: str, states: tuple[str, ...], giving_back: bool = False
    ) -> None:
        self._check_open()
        if not isinstance(block, Block):
            raise TypeError(f"{call}: block must be a Block, got {type(block).__name__}")
        if block._stream is not self:
            whose = "stream" if block._stream.cache is self.cache else "cache"
            raise ForeignStream(f"{call}: {block} belongs to another {whose}")
        if block.state in states:
            return
        if block.state in ("reserved", "committed"):
            raise ValueError(f"{call}: block must be {' or '.join(states)}, got {block}")
        error = DoubleFree if giving_back else StaleBlock
        raise error(f"{call}: {block} was given back before")

    @staticmethod
    def _check_not_held(call: str, block: Block) -> None:
        users = max(block._holds, block._keeps)
        if users:
            raise ValueError(f"{call}: {block} is held by {users} user(s), see hold()")
