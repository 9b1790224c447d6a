"""One stream's part of a `PagedKVCache`: list, summarise, move between tiers, hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from vicostream_kernels._blocks import Block
from vicostream_kernels._stream_life import StreamLife
from vicostream_kernels._summaries import KeyRows
from vicostream_kernels._tiers import NotResident


class CacheStream(StreamLife):
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

    def __enter__(self) -> CacheStream:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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

    def keep_keys(
        self,
        *,
        kind: str = "mean",
        unit: str = "chunk",
        sub: int = 1,
        source: str = "rotated",
    ) -> KeyRows:
        """Has ``rope_append`` summarise the keys of the chunks to come.

        Args:
            kind: "mean", or "minmax", the bounds of ``score="bound"``.
            unit: what has a row: a "chunk", or each "page" of one.
            sub: parts of a page with bounds of their own, for "minmax".
            source: the "rotated" keys, as stored, or the "raw" ones.

        Returns:
            `KeyRows`; ``of_layer`` and ``block_of_page`` go to ``rope_append``, ``summaries`` and
            ``table`` to ``topk_pages``.

        Raises:
            ValueError: the stream has chunks already, or summaries; or a bad argument.
        """
        self._check_open()
        if self.keys is not None or self.chunks or self._reserved:
            raise ValueError("keep_keys: call it once, before the first chunk is reserved")
        self.keys = KeyRows(self.cache, kind=kind, unit=unit, sub=sub, source=source)
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
        if cache._residency is not None:
            cache._residency.transfer.wait()  # what was fetched into these pages before
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
