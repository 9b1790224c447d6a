"""Summaries of keys, kept while a stream runs: a row for each chunk, or for each page of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vicostream_kernels._blocks import Block, padded, to_device
from vicostream_kernels.checks import check_choice, check_range
from vicostream_kernels.ops.append import KeySummary

if TYPE_CHECKING:
    from vicostream_kernels.cache import PagedKVCache

_FIRST_ROWS = 64


class KeyRows:
    """What ``rope_append`` keeps of the keys of one stream's chunks, in all layers.

    A chunk takes its rows when it is reserved, so that the forward that writes its keys can
    summarise them: one row with ``unit="chunk"``, one a body page with ``unit="page"``. Markers
    have pages of their own and no row. Rows stand in the order of the reservations. A dropped row
    is blanked at once; the table is rebuilt when it is full, twice as large if more than half of it
    lives, so its size is bounded by what lives, at O(1) a row amortised.

    Attributes:
        pages: [rows, M] int32, the pages of each row, -1 padded.
        kind, unit, sub, source: as given.

    Memory: float32 per layer, row and KV head, ``d`` values for the mean, ``2 * sub * d`` for the
    bound; ``bytes`` counts all of it.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        kind: str = "mean",
        unit: str = "chunk",
        sub: int = 1,
        source: str = "rotated",
    ) -> None:
        check_choice("KeyRows", "kind", kind, ("mean", "minmax"))
        check_choice("KeyRows", "unit", unit, ("chunk", "page"))
        check_choice("KeyRows", "source", source, ("rotated", "raw"))
        check_range("KeyRows", "sub", sub, 1, cache.page_size if kind == "minmax" else 1)
        self._cache, self.kind, self.unit, self.sub, self.source = cache, kind, unit, sub, source
        self._at: dict[Block, tuple[int, int]] = {}  # first row and number of rows, in row order
        self._end = self._live = 0
        self._owner = torch.full((cache.total_pages,), -1, dtype=torch.int32, device=cache.device)
        self.pages = torch.empty(0, 0, dtype=torch.int32, device=cache.device)
        self._tensors: dict[str, torch.Tensor] = self._empty(0)

    # -- what a forward writes -------------------------------------------------------------------

    @property
    def block_of_page(self) -> torch.Tensor:
        """[P] int32, the row of each page of the cache; -1 where it has none."""
        missing = self._cache.total_pages - len(self._owner)
        if missing:
            self._owner = torch.cat((self._owner, self._owner.new_full((missing,), -1)))
        return self._owner

    def of_layer(self, layer: int) -> KeySummary:
        """The rows of one layer as ``rope_append`` updates them, numbered by `block_of_page`."""
        return self._slice(layer, 0, len(self.pages))

    # -- what a question reads -------------------------------------------------------------------

    def rows(self, chunks: list[Block]) -> list[Block]:
        """The chunk of each row, for the oldest ``chunks`` of the stream; compacts the table, so
        that these are its first rows in `table` and `summaries`."""
        self._compact()
        return [block for block in chunks if block in self._at for _ in range(self._at[block][1])]

    def table(self, rows: int) -> torch.Tensor:
        """Pages of the first ``rows`` rows, [1, rows, M] int32; a view."""
        return self.pages[self._start : self._start + rows].unsqueeze(0)

    def summaries(self, rows: int) -> list[KeySummary]:
        """Each layer's summary of the first ``rows`` rows, for ``topk_blocks``; views, which keep
        these rows when later ones are first or the table is rebuilt."""
        first = self._start
        return [self._slice(layer, first, first + rows) for layer in range(self._cache.layers)]

    @property
    def live_share(self) -> float:
        """Rows in use, of all."""
        return self._live / len(self.pages) if len(self.pages) else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of all rows, used or not."""
        return sum(t.nbytes for t in (self._owner, self.pages, *self._tensors.values()))

    def rows_of(self, block: Block) -> dict[str, torch.Tensor]:
        """The summaries of one chunk by name, [layers, rows, ...] each; views. Empty where it has
        no row."""
        if block not in self._at:
            return {}
        first, n = self._at[block]
        return {name: tensor[:, first : first + n] for name, tensor in self._tensors.items()}

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        """The summaries of all rows by name, [layers, rows, ...] each; see `places`."""
        return self._tensors

    def places(self, block: Block) -> range:
        """The rows of one chunk in `tables`, until the next chunk is reserved."""
        first, n = self._at.get(block, (0, 0))
        return range(first, first + n)

    # -- for the stream --------------------------------------------------------------------------

    def reserve(self, block: Block) -> None:
        """Gives a reserved chunk its rows, and its pages theirs."""
        ids, _ = block.body_ids, self.block_of_page  # grown before anything is noted
        if not len(ids):
            return
        n, width = (len(ids), 1) if self.unit == "page" else (1, len(ids))
        if self._end + n > len(self.pages) or width > self.pages.shape[1]:
            self._make_room(n, width)
        first, self._end = self._end, self._end + n
        self._at[block], self._live = (first, n), self._live + n
        self._set_pages(block, first, n)

    def trim(self, block: Block, unused: torch.Tensor) -> None:
        """The count left the body pages ``unused``, [n] int64, the last ones: they have gone."""
        (first, n), kept = self._at[block], len(block.body.pages)
        self.block_of_page.index_fill_(0, unused, -1)
        if not kept:
            self._forget(block)
        elif self.unit == "chunk":
            self.pages[first, kept:].fill_(-1)
        else:
            self.pages[first + kept : first + n].fill_(-1)
            self._at[block], self._live = (first, kept), self._live - (n - kept)
            if self._end == first + n:
                self._end = first + kept  # nothing was written beyond

    def left(self, blocks: Sequence[Block]) -> None:
        """The blocks go to a lower tier; their pages are still known. The rows stay."""
        here = [block for block in blocks if block in self._at]
        if not here:
            return
        device = self._cache.device
        rows = [row for first, n in map(self._at.get, here) for row in range(first, first + n)]
        ids = [page for block in here for page in block.body.pages]
        self.block_of_page.index_fill_(0, to_device(ids, torch.int64, device), -1)
        self.pages.index_fill_(0, to_device(rows, torch.int64, device), -1)

    def came(self, blocks: Sequence[Block]) -> None:
        """The blocks have pages again."""
        here = [block for block in blocks if block in self._at]
        if not here:
            return
        device, by_page = self._cache.device, self.unit == "page"
        lists = [block.body.pages for block in here]
        firsts = [self._at[block][0] for block in here]
        owners = [
            first + i * by_page for first, pages in zip(firsts, lists) for i in range(len(pages))
        ]
        ids = to_device([page for pages in lists for page in pages], torch.int64, device)
        rows = to_device(owners, torch.int64, device)
        self.block_of_page.index_copy_(0, ids, rows.to(torch.int32))
        if by_page:
            self.pages[:, 0].index_copy_(0, rows, ids.to(torch.int32))
        else:
            pages = padded(lists, self.pages.shape[1], device)
            self.pages.index_copy_(0, to_device(firsts, torch.int64, device), pages)

    def drop(self, block: Block) -> None:
        """Blanks the rows of a block that goes; its pages are still known."""
        if block in self._at:
            self.block_of_page.index_fill_(0, block.body_ids, -1)
            self._forget(block)

    def _set_pages(self, block: Block, first: int, n: int) -> None:
        ids = block.body_ids
        if self.unit == "page":
            self.pages[first : first + n, 0] = ids
            rows = torch.arange(first, first + n, dtype=torch.int32, device=ids.device)
            self.block_of_page.index_copy_(0, ids, rows)
        else:
            self.pages[first, : len(ids)] = ids
            self.block_of_page.index_fill_(0, ids, first)

    def _forget(self, block: Block) -> None:
        first, n = self._at.pop(block)
        self._live -= n
        self.pages[first : first + n].fill_(-1)
        if first + n == self._end:  # the next block takes these rows
            for name, tensor in self._tensors.items():
                tensor[:, first : first + n].fill_(_START[name])
            self._end = first

    # -- parts -----------------------------------------------------------------------------------

    @property
    def _start(self) -> int:
        return next(iter(self._at.values()))[0] if self._at else self._end

    def _compact(self) -> None:
        if self._end - self._start != self._live:
            self._rebuild(*self.pages.shape)

    def _make_room(self, n: int, width: int) -> None:
        rows, columns = self.pages.shape
        if self._end + n > rows:
            needed = self._live + n
            rows = rows if 2 * needed <= rows else max(_FIRST_ROWS, 2 * needed)
        self._rebuild(rows, columns if width <= columns else max(width, 2 * columns))

    def _rebuild(self, rows: int, columns: int) -> None:
        device, n = self._cache.device, self._live
        live = [row for first, count in self._at.values() for row in range(first, first + count)]
        index = to_device(live, torch.int64, device)
        pages = torch.full((rows, columns), -1, dtype=torch.int32, device=device)
        pages[:n, : self.pages.shape[1]] = self.pages.index_select(0, index)
        fresh = self._empty(rows)
        for name, tensor in fresh.items():
            tensor[:, :n] = self._tensors[name].index_select(1, index)
        self.pages, self._tensors = pages, fresh
        at, owned, owners = 0, [], []
        for block, (_, count) in self._at.items():
            self._at[block] = (at, count)
            ids = block.body.pages
            if ids:  # none while the block lies in a lower tier
                owned += ids
                owners += range(at, at + count) if self.unit == "page" else [at] * len(ids)
            at += count
        self._end = n
        self.block_of_page.index_copy_(
            0, to_device(owned, torch.int64, device), to_device(owners, torch.int32, device)
        )

    def _empty(self, rows: int) -> dict[str, torch.Tensor]:
        cache = self._cache
        shapes = {
            "sum": (cache.layers, rows, cache.kv_heads, cache.head_dim),
            "count": (cache.layers, rows),
        }
        if self.kind == "minmax":
            shape = (cache.layers, rows, self.sub, cache.kv_heads, cache.head_dim)
            shapes = {"kmin": shape, "kmax": shape}
        return {
            name: torch.full(
                shape,
                _START[name],
                dtype=torch.int32 if name == "count" else torch.float32,
                device=cache.device,
            )
            for name, shape in shapes.items()
        }

    def _slice(self, layer: int, first: int, last: int) -> KeySummary:
        parts = {name: tensor[layer, first:last] for name, tensor in self._tensors.items()}
        return KeySummary(**parts, source=self.source)


#: What a summary of no keys holds.
_START = {"sum": 0, "count": 0, "kmin": float("inf"), "kmax": -float("inf")}
