"""The paged key-value cache: pools shared by all layers and streams, with one page allocator.

A page id stands for the same tokens in every layer. `page_fill` says how many slots of each page
are valid; a free page has fill 0, so an entry for it in a stale table contributes nothing until the
page has a new owner. Blocks (chunks, sinks, texts) never share a page.

One thread at a time may drive a cache, and its device work must be ordered (one CUDA stream, or
streams that wait for each other): a page that was given back may be written by its next owner.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

import torch

from vicostream_kernels._blocks import Block, Forgotten, Segment
from vicostream_kernels._huge_pages import empty_pool
from vicostream_kernels._pages import (
    CacheClosed,
    DoubleFree,
    ForeignStream,
    OutOfPages,
    PagePool,
    StaleBlock,
    check_int,
)
from vicostream_kernels._placement import runs_of
from vicostream_kernels._residency import Residency
from vicostream_kernels._stream import CacheStream
from vicostream_kernels._summaries import KeyRows
from vicostream_kernels._tiers import DiskFull, LostBlock, NotResident, TierError, Tiers
from vicostream_kernels._transfer import slots_in
from vicostream_kernels.checks import FLOAT_DTYPES, check_choice, check_dtype

__all__ = [
    "Block",
    "CacheClosed",
    "CacheStream",
    "DiskFull",
    "DoubleFree",
    "ForeignStream",
    "Forgotten",
    "KeyRows",
    "LostBlock",
    "NotResident",
    "OutOfPages",
    "PagedKVCache",
    "Segment",
    "StaleBlock",
    "TierError",
    "Tiers",
]

_MAX_SLOTS = 2**31 - 1  # slots are int32


class PagedKVCache:
    """Pools of ``pages`` pages of ``page_size`` tokens, for all layers and any number of streams.

    Args:
        layers, pages, page_size, kv_heads, head_dim: sizes, each >= 1.
        dtype: of keys and values: float32, float16, bfloat16 (float64 for tests).
        device: where the pools live.
        raw_keys: keep a second pool of keys before rotation.
        on_full: "error", or "evict_oldest": committed unpinned chunks go, the oldest of the asking
            stream first, then the oldest of the other open streams.
        grow: double the pools when they are exhausted, up to ``max_pages`` or what a GPU has
            memory for, before ``on_full`` applies. The pool attributes are new tensors then: read
            them after reserve.
        max_pages: with ``grow``; default: as many as int32 slots can name.
        tiers: budgets in bytes for what lives in memory and below it. ``pages`` is at most what
            the memory budget allows then, ``grow`` must be off, and a full pool sends the chunks
            that were not retrieved for longest to the next tier; ``on_full`` does not apply.

    Attributes:
        k_pages, v_pages: [layers, P, B, G, d] of ``dtype``; contents of unfilled slots are
            arbitrary. raw_k_pages: the same, or None.
        page_fill: [P] int32 on the device, valid slots of each page.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        raw_keys: bool = False,
        on_full: str = "error",
        grow: bool = False,
        max_pages: int | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        me = "PagedKVCache"
        sizes = {"layers": layers, "page_size": page_size, "pages": pages, "kv_heads": kv_heads}
        for name, value in (*sizes.items(), ("head_dim", head_dim)):
            check_int(me, name, value, 1)
        limit = _MAX_SLOTS // page_size
        check_int(me, "pages", pages, 1, limit)
        if max_pages is not None:
            if not grow:
                raise ValueError(f"{me}: max_pages={max_pages} needs grow=True")
            check_int(me, "max_pages", max_pages, pages, limit)
        check_choice(me, "on_full", on_full, ("error", "evict_oldest"))
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{me}: dtype must be a torch.dtype, got {type(dtype).__name__}")
        allowed = (*FLOAT_DTYPES, torch.float64)
        check_dtype(me, "dtype", torch.empty(0, dtype=dtype), allowed)

        self.layers, self.page_size, self.kv_heads = layers, page_size, kv_heads
        self.head_dim, self.dtype, self.on_full, self.grow = head_dim, dtype, on_full, grow
        self._names = ("k", "v", "raw_k") if raw_keys else ("k", "v")
        if tiers is not None:
            pages = min(pages, self._pages_within(tiers))
        self.max_pages = pages if not grow else limit if max_pages is None else max_pages
        self._pool = PagePool(pages)
        self._streams: dict[CacheStream, None] = {}
        self._order = 0
        self._fill = torch.zeros(pages, dtype=torch.int32, device=torch.device(device))
        self.device = self._fill.device
        self._pools = {name: self._new_pool(pages) for name in self._names}
        self._residency = None if tiers is None else Residency(self, tiers)
        self._no_memory = False  # for larger pools, when they were asked for
        self.closed = False

    # -- pools -----------------------------------------------------------------------------------

    @property
    def k_pages(self) -> torch.Tensor:
        self._check_open()
        return self._pools["k"]

    @property
    def v_pages(self) -> torch.Tensor:
        self._check_open()
        return self._pools["v"]

    @property
    def raw_k_pages(self) -> torch.Tensor | None:
        self._check_open()
        return self._pools.get("raw_k")

    @property
    def page_fill(self) -> torch.Tensor:
        self._check_open()
        return self._fill

    @property
    def total_pages(self) -> int:
        return self._pool.total

    @property
    def free_pages(self) -> int:
        return self._pool.free

    @property
    def used_pages(self) -> int:
        """Pages that some block owns, reserved ones included."""
        return self._pool.used

    @property
    def bytes_per_page(self) -> int:
        """Keys, values and raw keys of one page in all layers."""
        token = self.kv_heads * self.head_dim * self.dtype.itemsize
        return len(self._names) * self.layers * self.page_size * token

    @property
    def summary_bytes(self) -> int:
        """Bytes of the summaries of all open streams, see `CacheStream.summary_bytes`."""
        return sum(stream.summary_bytes for stream in self._streams)

    @property
    def live_summary_bytes(self) -> int:
        """The same for the chunks that live, without rows not in use."""
        return sum(stream.live_summary_bytes for stream in self._streams)

    @property
    def bytes_per_token(self) -> int:
        """Keys, values and raw keys of one token in all layers."""
        return self.bytes_per_page // self.page_size

    @property
    def bytes(self) -> int:
        """Bytes of the used pages."""
        return self.used_pages * self.bytes_per_page

    @property
    def peak_bytes(self) -> int:
        """The largest `bytes` so far."""
        return self._pool.peak * self.bytes_per_page

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages, used or not; 0 after the close."""
        return 0 if self.closed else self.total_pages * self.bytes_per_page

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one segment take."""
        return -(-tokens // self.page_size)

    # -- tiers -----------------------------------------------------------------------------------

    @property
    def tiers(self) -> Tiers | None:
        """The budgets, as given."""
        return None if self._residency is None else self._residency.tiers

    def tier(self, block: Block) -> str:
        """Where a committed block lies: "device" ("memory" on the CPU), "host" or "disk"."""
        if self._residency is not None:
            return self._residency.tier(block)
        return "device" if self.device.type == "cuda" else "memory"

    def tier_bytes(self) -> dict[str, tuple[int, int | None]]:
        """Bytes and budget (None: no limit) of each tier, summaries included."""
        self._check_open()
        if self._residency is not None:
            return self._residency.bytes()
        name = "device" if self.device.type == "cuda" else "memory"
        return {name: (self.bytes + self.summary_bytes, None)}

    def make_room(self, pages: int) -> None:
        """Sends chunks down until ``pages`` pages are free, as far as that is possible: what is
        reserved next need not wait. Nothing without tiers. Raises DiskFull."""
        self._check_open()
        if self._residency is not None:
            self._residency.make_room(pages)

    def ready(self, layer: int) -> None:
        """Called before keys of ``layer`` are written, and again before they are read where more
        may have been fetched: the current CUDA stream waits for what was, in this layer and those
        before it. Nothing on the CPU."""
        if self._residency is not None:
            self._residency.transfer.ready(layer)

    def settle(self) -> None:
        """Waits for what is on its way to files. Raises DiskFull."""
        self._check_open()
        if self._residency is not None:
            self._residency.below.settle()

    # -- streams ---------------------------------------------------------------------------------

    def open(self) -> CacheStream:
        """A new stream. Raises CacheClosed after `close`."""
        self._check_open()
        stream = CacheStream(self)
        self._streams[stream] = None
        return stream

    @property
    def streams(self) -> list[CacheStream]:
        """The open streams, in the order in which they were opened."""
        return list(self._streams)

    def close(self) -> None:
        """Closes every stream and lets go of the pools; a second close does nothing.

        Accounts (`peak_bytes`, a stream's `forgotten`) stay readable.
        """
        if self.closed:
            return
        for stream in self.streams:
            stream.close()
        if self._residency is not None:
            self._residency.close()
        self._pools = {}
        self._fill = self._fill[:0].clone()
        self.closed = True

    def __enter__(self) -> PagedKVCache:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- for the streams -------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise CacheClosed("the cache was closed")

    def _next_order(self) -> int:
        self._order += 1
        return self._order

    def _take(self, n: int, block: Block, asked: str) -> list[int]:
        self._free(n, block._stream, asked)
        return self._pool.take(n, block)

    def _free(self, n: int, stream: CacheStream, asked: str) -> None:
        """Has ``n`` pages free, or raises when nothing has changed."""
        if self._residency is not None:
            if self._residency.make_room(n):
                raise OutOfPages(self._why_full(n, stream, asked))
        elif n > self.free_pages:
            self._make_room(n, stream, asked)

    def _give(self, pages: list[int], block: Block) -> None:
        self._pool.give(pages, block)

    def _clear(self, ids: torch.Tensor) -> None:
        """Pages that go back hold nothing: what still lists them reads nothing."""
        self._fill.index_fill_(0, ids, 0)

    def _make_room(self, n: int, stream: CacheStream, asked: str) -> None:
        """Grows, then evicts, until ``n`` pages are free; decides before it changes anything."""
        total = self.total_pages
        target = total
        while target < self.max_pages and target - total + self.free_pages < n:
            target = min(2 * target, self.max_pages)
        short = n - self.free_pages - (target - total)
        victims = []
        if self.on_full == "evict_oldest" and short > 0:
            for victim in self._evictable(stream):
                victims.append(victim)
                short -= len(victim.pages)
                if short <= 0:
                    break
        if short > 0:
            raise OutOfPages(self._why_full(n, stream, asked))
        if target > total and not self._grow_to(target, total + n - self.free_pages):
            return self._make_room(n, stream, asked)  # with what there is
        for victim in victims:
            victim._stream._evict(victim)

    def _evictable(self, stream: CacheStream) -> Iterator[Block]:
        others = (s.chunks.oldest_first() for s in self._streams if s is not stream)
        runs = (stream.chunks.oldest_first(), heapq.merge(*others, key=lambda b: b._order))
        return (b for run in runs for b in run if not b.pinned and not b._holds)

    def _grow_to(self, total: int, least: int) -> bool:
        """Whether there is memory for more pages, if not for ``total`` then for a quarter more and
        ``least``. Where there is none, the cache has its largest size from then on."""
        old = self.total_pages
        for target in sorted({total, min(total, max(least, old + old // 4))}, reverse=True):
            try:
                self._extend(target)
                return True
            except torch.OutOfMemoryError:  # the old pools are needed beside the new ones
                continue
        self.max_pages, self._no_memory = old, True
        return False

    def _extend(self, total: int) -> None:
        old = self.total_pages
        # All allocations come first: when one fails, the cache is as it was.
        fill = torch.zeros(total, dtype=torch.int32, device=self.device)
        pools = {name: self._new_pool(total) for name in self._pools}
        fill[:old] = self._fill
        for name, pool in pools.items():
            pool[:, :old] = self._pools[name]
        self._fill, self._pools = fill, pools
        self._pool.extend(total - old)

    def _pages_within(self, tiers: Tiers) -> int:
        """Pages that the memory budget allows; checks what goes with tiers."""
        if not isinstance(tiers, Tiers):
            raise TypeError(f"PagedKVCache: tiers must be Tiers, got {type(tiers).__name__}")
        if self.grow:
            raise ValueError("PagedKVCache: tiers have a memory budget: grow must be False")
        pages = (tiers.page_bytes - tiers.reserve_bytes) // self.bytes_per_page
        if pages < 1:
            moving = tiers.memory_bytes - tiers.page_bytes
            raise ValueError(
                f"PagedKVCache: memory_bytes={tiers.memory_bytes} leaves no page of "
                f"{self.bytes_per_page} bytes beside {moving} for what is on its way to files and "
                f"{tiers.reserve_bytes} for rows of summaries"
            )
        return pages

    def _record_shape(self, tokens: int) -> tuple[int, ...]:
        return (self.layers, len(self._names), tokens, self.kv_heads, self.head_dim)

    def _fills(self, block: Block) -> list[int]:
        """Tokens in each page of a committed block, were it to have pages."""
        size = self.page_size
        return [min(left, size) for n in block.counts for left in range(n, 0, -size)]

    def _runs(self, block: Block) -> list[tuple[int, int]]:
        """Where the tokens of a committed block lie: see `runs_of`."""
        return runs_of(block.pages, self._fills(block), self.page_size)

    def _read(self, block: Block) -> torch.Tensor:
        """What a committed block holds, wherever it lies; see `CacheStream.contents`."""
        if block._away:
            return self._residency.below.load(block)
        if self._residency is not None:
            self._residency.transfer.wait()
        slots = slots_in(self._runs(block), self.device)
        found = [pool.flatten(1, 2).index_select(1, slots) for pool in self._pools.values()]
        return torch.stack(found, dim=1).cpu()

    def _new_pool(self, pages: int) -> torch.Tensor:
        shape = (self.layers, pages, self.page_size, self.kv_heads, self.head_dim)
        return empty_pool(shape, parts=self.layers, dtype=self.dtype, device=self.device)

    def _why_full(self, n: int, stream: CacheStream, asked: str) -> str:
        held: Counter[str] = Counter()
        for other in self._streams:
            for block in [*other.blocks, *other._reserved]:
                if block.state == "reserved":
                    why = "reserved, not committed"
                elif block.kind != "chunk":
                    why = f"in {block.kind}s"
                elif block.pinned or block._holds:
                    why = "in chunks pinned or held"
                else:
                    why = "in chunks that could be evicted"
                held[why] += len(block.pages)
        holders = ", ".join(f"{count} {why}" for why, count in held.items() if count) or "none"
        helps = []
        if self._no_memory:
            helps.append(f"more memory: there was none for more than {self.max_pages} pages")
        if n > self.max_pages:
            helps.append(f"a cache of at least {n} pages")
            if self.tiers is not None:
                helps.append("which takes a larger memory budget (engine.history_bytes)")
        else:
            if self.on_full == "error" and held["in chunks that could be evicted"]:
                helps.append("on_full='evict_oldest' or evict() of chunks")
            if held["in chunks pinned or held"]:
                helps.append("unpinning chunks (the engine: closing answers, a smaller window)")
            if held["reserved, not committed"]:
                helps.append("commit() or rollback() of reservations")
            if held["in texts"]:
                helps.append("free() of texts that are done")
            if self.tiers is not None:
                helps.append("a larger memory budget (engine.history_bytes)")
            elif not self._no_memory:
                helps.append(
                    "a larger max_pages (engine.max_pages)"
                    if self.grow
                    else "more pages or grow=True"
                )
        return (
            f"{asked}: {n} pages of {self.page_size} tokens asked, {self.free_pages} of "
            f"{self.total_pages} are free (on_full={self.on_full!r}, at most {self.max_pages} "
            f"pages). In use by {len(self._streams)} stream(s): {holders}. "
            f"What would help: {'; '.join(helps)}."
        )
