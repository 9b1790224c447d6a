"""One stream's part of a `PagedKVCache`: reserve, plan, commit, list, summarise, forget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
from vicostream_kernels._tiers import Loss, NotResident

if TYPE_CHECKING:
    from vicostream_kernels.cache import PagedKVCache


class CacheStream:
    """Made by `PagedKVCache.open`; a context manager.

    The life of a block: ``reserve`` (host: pages) -> ``plan`` (device: slots, page_fill; no sync)
    -> ``commit`` (the count has reached the host: unused pages go back) -> ``evict`` or ``free``;
    ``rollback`` abandons what is not committed.

    ``blocks`` (all), ``chunks`` and ``sinks`` list the live committed blocks in commit order; read
    them, slice them, don't change them. ``forgotten`` says what was evicted, ``losses`` what of it
    was given up because a lower tier failed (the newest 1,024). Every method raises CacheClosed
    after a close, ForeignStream for a block of another stream or cache, StaleBlock for a block that
    is gone (DoubleFree from evict/free/rollback), before anything changes.
    """

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

        Body and markers get pages of their own: ceil(n / page_size) each. A "sink" is always
        pinned. When the pool is short it grows or evicts, as the cache was told; victims are the
        oldest unpinned committed chunks, of this stream first. Reserve before `page_table`: the
        victims may be in the table otherwise.

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
        asked = f"reserve({kind}, bucket={bucket}, markers={block.markers})"
        pages = self.cache._take(sum(counts), block, asked)
        block._ids = to_device(pages, torch.int64, self.cache.device)
        for segment, n in zip(segments, counts):
            segment.pages, pages = pages[:n], pages[n:]
        if self.keys is not None and kind == "chunk":
            self.keys.reserve(block)
        self._reserved[block] = None
        return block

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
            taken = cache._take(missing, block, f"append_tokens(n={n})")
            block._ids = torch.cat((block._ids, to_device(taken, torch.int64, cache.device)))
            pages.extend(taken)
        for p in range(old // size, cache.pages_for(new)):
            # Host scalars reach the device as kernel arguments: nothing is copied.
            cache.page_fill[pages[p] : pages[p] + 1].fill_(min(new - p * size, size))
        block.tokens += n
        self.tokens += n
        slots = [pages[i // size] * size + i % size for i in range(old, new)]
        if n == 1:
            return torch.full((1,), slots[0], dtype=torch.int32, device=cache.device)
        return to_device(slots, torch.int32, cache.device)

    # -- what a forward reads --------------------------------------------------------------------

    def page_table(self, blocks: Sequence[Block], *, markers: bool = True) -> torch.Tensor:
        """Pages of ``blocks`` in the order given, [1, L] int32; O(L), on the device.

        ``markers=False`` leaves marker pages out. Planned blocks may be listed before the commit:
        pages they do not fill contribute nothing. A table holds until one of its blocks is
        committed, freed, evicted or sent to a lower tier; see `hold`. Raises NotResident for a
        block that lies there.
        """
        self._check_open()
        blocks = list(blocks)
        for block in blocks:
            self._require(block, "page_table", ("reserved", "committed"))
            if block._away:
                raise NotResident(f"page_table: {block} lies in the tier {block.tier!r}: fetch it")
        if len(set(blocks)) != len(blocks):
            raise ValueError("page_table: blocks lists a block twice")
        parts = [block._ids if markers else block.body_ids for block in blocks]
        if not parts:
            return torch.empty(1, 0, dtype=torch.int32, device=self.cache.device)
        return torch.cat(parts).to(torch.int32).unsqueeze(0)

    def block_pages(self) -> tuple[torch.Tensor, int]:
        """Body pages of the chunks, ([1, NB, M] int32 with -1 padding, NB), in time order.

        Row r belongs to the r-th chunk that kept body tokens (``block.row == r``; chunks that kept
        none have no row). The tensor is a view: an eviction blanks its row with -1 in place, and
        the row is absent from the next call's view. A chunk in a lower tier has a row of -1, which
        `fetch` fills in place.
        """
        self._check_open()
        table = self._table
        table.compact()
        return table.pages[table.start : table.end].unsqueeze(0), len(table.blocks)

    def set_summary(self, block: Block, vector: torch.Tensor) -> None:
        """Keeps ``vector`` [D] (any float dtype, kept as fp32) as the summary of a chunk.

        May come before the commit; it is dropped when the chunk keeps no body tokens. The first
        call of a stream fixes D.
        """
        self._require(block, "set_summary", ("reserved", "committed"))
        if block.kind != "chunk":
            raise ValueError(f"set_summary: block must be a chunk, got {block}")
        if not isinstance(vector, torch.Tensor) or not vector.is_floating_point():
            got = getattr(vector, "dtype", type(vector).__name__)
            raise TypeError(f"set_summary: vector must be a float tensor, got {got}")
        known = self._table.vectors
        wanted = None if known is None else known.shape[1]
        if vector.dim() != 1 or len(vector) == 0 or wanted not in (None, len(vector)):
            raise ValueError(
                f"set_summary: vector must be [{'D' if wanted is None else wanted}], "
                f"got shape {tuple(vector.shape)}"
            )
        if vector.device != self.cache.device:
            raise ValueError(
                f"set_summary: vector is on {vector.device}, the cache on {self.cache.device}"
            )
        if block.state == "reserved" or block._row >= 0:
            self._table.set_summary(block, vector)

    def summaries(self) -> torch.Tensor:
        """[1, NB, D] fp32, rows as in `block_pages`; a view. Raises ValueError while a chunk that
        has a row has no summary."""
        self._check_open()
        table = self._table
        if table.missing:
            lacking = next(b for b in table.blocks.oldest_first() if not b._summarised)
            raise ValueError(
                f"summaries: {table.missing} of {len(table.blocks)} chunks have no summary, "
                f"the first is {lacking}; call set_summary for each"
            )
        table.compact()
        if table.vectors is None:
            return torch.zeros(1, 0, 0, device=self.cache.device)
        return table.vectors[table.start : table.end].unsqueeze(0)

    def keep_keys(self, **kind: Any) -> KeyRows:
        """Has ``rope_append`` summarise the keys of the chunks to come; see `KeyRows` for the
        options. Raises ValueError when the stream has chunks already, or summaries."""
        self._check_open()
        if self.keys is not None or self.chunks or self._reserved:
            raise ValueError("keep_keys: call it once, before the first chunk is reserved")
        self.keys = KeyRows(self.cache, **kind)
        return self.keys

    # -- tiers -----------------------------------------------------------------------------------

    def fetch(self, blocks: Sequence[Block]) -> list[str | None]:
        """Gives pages to those of ``blocks``, committed ones, that lie in lower tiers, and counts
        all as retrieved now. Others may go down for them, none that are held or pinned. No wait on
        a GPU: attention waits, layer by layer (`PagedKVCache.ready`).

        Returns:
            where each was read from; None for one that was given up (``Tiers.allow_missing``).

        Raises:
            OutOfPages: they do not fit beside what is held and pinned.
            LostBlock, DiskFull: a file is missing, altered, or cannot be written.
        """
        self._check_open()
        blocks = list(blocks)
        for block in blocks:
            self._require(block, "fetch", ("committed",))
        cache = self.cache
        found = [cache.tier(block) for block in blocks]
        if cache._residency is None:
            return found
        cache._residency.fetch(blocks, f"fetch of {len(blocks)} blocks")
        return [name if b.state == "committed" else None for b, name in zip(blocks, found)]

    def spill(self, blocks: Sequence[Block]) -> None:
        """Sends committed chunks to the tier below now; those that are there already stay. Raises
        ValueError for one that is pinned or held, or where there is no lower tier."""
        self._check_open()
        blocks = list(dict.fromkeys(blocks))
        for block in blocks:
            self._require(block, "spill", ("committed",))
            if block.kind != "chunk" or block.pinned:
                raise ValueError(f"spill: block must be a chunk that is not pinned, got {block}")
            if block._holds:
                raise ValueError(f"spill: {block} is held by {block._holds} user(s), see hold()")
        if self.cache._residency is None:
            raise ValueError("spill: the cache was made without tiers")
        self.cache._residency.spill([b for b in blocks if b.pages])

    def contents(self, block: Block) -> torch.Tensor:
        """Keys, values (and raw keys) of a committed block, [layers, 2 or 3, tokens, G, d] on the
        host, from whatever tier and without moving it. Holds until the next call."""
        self._require(block, "contents", ("committed",))
        return self.cache._read(block)

    def adopt(
        self,
        contents: torch.Tensor,
        *,
        kind: str,
        markers: tuple[int, int],
        start_s: float,
        end_s: float,
        pinned: bool,
        summary: torch.Tensor | None = None,
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> Block:
        """A committed block with the ``contents`` that another stream's block had; ``summary`` and
        ``rows`` are what that stream knew of its keys. Raises as `reserve` does."""
        cache, count = self.cache, contents.shape[2] - sum(markers)
        if contents.shape != cache._record_shape(count + sum(markers)):
            raise ValueError(f"adopt: contents of shape {tuple(contents.shape)} do not fit")
        block = self.reserve(
            count, kind=kind, markers=markers, start_s=start_s, end_s=end_s, pinned=pinned
        )
        slots = self.plan(block, count, count + sum(markers)).long()
        for p, pool in enumerate(cache._pools.values()):
            pool.flatten(1, 2).index_copy_(1, slots, contents[:, p].to(cache.device))
        if summary is not None:
            self.set_summary(block, summary.to(cache.device))
        for name, view in ({} if self.keys is None else self.keys.rows_of(block)).items():
            view.copy_(rows[name])
        self.commit(block, count)
        return block

    @property
    def live_summary_bytes(self) -> int:
        """Bytes of the summaries of the chunks that live."""
        table, keys = self._table, self.keys
        kept = 0 if keys is None else int(keys.bytes * keys.live_share)
        if table.vectors is not None:
            kept += 4 * table.vectors.shape[1] * len(table.blocks)
        return kept

    @property
    def summary_bytes(self) -> int:
        """Bytes of the summaries of the stream's chunks, rows not in use included."""
        vectors = self._table.vectors
        kept = 0 if self.keys is None else self.keys.bytes
        return kept + (0 if vectors is None else vectors.nbytes)

    @contextmanager
    def hold(self, blocks: Sequence[Block], *, resident: bool = True) -> Iterator[None]:
        """Keeps ``blocks`` from being evicted or freed inside the ``with``, e.g. while an answer
        is decoded over a frozen selection. Holds nest. ``resident=False`` lets them move to lower
        tiers, but not be forgotten; with it, what has pages keeps them."""
        self._check_open()
        blocks = list(blocks)
        for block in blocks:
            self._require(block, "hold", ("committed",))
        change = 1 if resident else 0
        for block in blocks:
            block._holds += change
            block._keeps += 1
        try:
            yield
        finally:
            for block in blocks:
                block._holds -= change
                block._keeps -= 1

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
        self.blocks.clear()
        self.chunks.clear()
        self.sinks.clear()
        self._reserved.clear()
        self.tokens = 0
        self._table, self.keys = BlockTable(self.cache.device), None
        self.closed = True
        self.cache._streams.pop(self, None)

    def __enter__(self) -> CacheStream:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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

    def _leaves(self, block: Block) -> None:
        """The block is about to give its pages back and live on in a lower tier."""
        if self.keys is not None:
            self.keys.left(block)

    def _moved(self, block: Block) -> None:
        """The block has other pages now, or none."""
        if block._row >= 0:
            self._table.moved(block)
        if self.keys is not None and not block._away:
            self.keys.came(block)

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
