"""What the forwards of one question read: which blocks, when they are chosen, and their pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vicostream_kernels._blocks import to_device
from vicostream_kernels.cache import Block
from vicostream_kernels.methods import RetrieveRule
from vicostream_kernels.models.text import PageList
from vicostream_kernels.ops.retrieve import TopBlocks, select_pages
from vicostream_kernels.pipeline.rebase import Rebase
from vicostream_kernels.pipeline.selection import Asked, Rows, RuleSelector, Selector
from vicostream_kernels.pipeline.visibility import History

#: Choices of layers that wait to be counted; more of them are counted at once.
_MOST_UNCOUNTED = 512


@dataclass(frozen=True)
class Relevance:
    """One chunk that a question could have read.

    score: of its best row, averaged over the heads and layers that choose; NaN where none did.
    share: of the lists that were chosen (layers x heads x times), how many have it.
    """

    block: Block
    score: float
    share: float


class Reading:
    """The pages of a question at ``time_s``: system prompt, chosen blocks, end of the last chunk.

    Dense layers, and a dense prompt, read every block. Call `begin` before the prompt is read and
    `step` before each decoded token; layers call the object itself (see ``models.Attend``); call
    `close` at the end. With tiers, what is chosen is fetched when it is, and stays until then.
    """

    def __init__(
        self,
        rule: RetrieveRule,
        selector: Selector,
        history: History,
        *,
        time_s: float,
        first_id: int,
        asking: slice,
        backend: str,
    ) -> None:
        self._rule, self._selector, self._backend = rule, selector, backend
        self._per_layer = getattr(selector, "per_layer", False)
        self._time_s, self._asking = time_s, asking
        self._cache, cache = history.cache, history.cache
        self._tiered = cache.cache.tiers is not None
        self._holding = ExitStack()
        self._tiers: dict[Block, str | None] = {}
        always = [b for b in (history.sink, history.preamble) if b is not None]
        self.chunks = chunks = history.chunks(time_s)
        if self._tiered:
            # What may still be chosen must not be forgotten, wherever it lies.
            self._holding.enter_context(cache.hold(chunks, resident=False))
            try:
                while chunks:  # the last one that can be read, for its end marker
                    self._fetch(chunks[-1:])
                    if self._tiers[chunks[-1]] is not None:
                        break
                    chunks.pop()
            except BaseException:
                self.close()
                raise
            self.chunks = chunks = [block for block in chunks if block.state == "committed"]
        self._prefix = cache.page_table(always)
        self._suffix = self._prefix.new_empty(1, 0)
        if chunks and chunks[-1].markers[1]:
            self._suffix = to_device(
                chunks[-1].segments[-1].pages, torch.int32, self._prefix.device
            ).unsqueeze(0)
        self._always = (*always, *chunks[-1:])
        self.rows = self._candidates(chunks)
        # Now: a fetch may lose the first row, and an ingest rebuild the table, while this is open.
        self._summaries = [] if cache.keys is None else cache.keys.summaries(len(self.rows))
        self._place: dict[Block, list[int]] = {}
        for row, block in enumerate(self.rows.blocks if self._tiered else ()):
            self._place.setdefault(block, []).append(row)
        #: Number of the chunk of each row, counted over the chunks that have rows.
        order = {block: n for n, block in enumerate(dict.fromkeys(self.rows.blocks))}
        self._chunks = list(order)
        self._chunk_of_row = to_device(
            [order[b] for b in self.rows.blocks], torch.int64, self._prefix.device
        )
        self._rebase = None
        if rule.positions == "consecutive":
            end = first_id - self._suffix.shape[1]
            self._rebase = Rebase(
                history, always, self._chunks, self._prefix, self.rows.pages, self._chunk_of_row,
                end,
            )  # fmt: skip
        for block in self._tiers:
            self._show(block)
        self._step = 0
        self._made: dict[int, tuple[int, PageList]] = {}
        self._everything: PageList | None = None
        self._lists, self._uncounted = 0, []
        self._hits = [0] * len(self._chunks)
        self._scores: dict[int, torch.Tensor] = {}

    # -- what is read ----------------------------------------------------------------------------

    def begin(self, embeds: torch.Tensor) -> PageList | None:
        """The one list of pages for all layers and tokens, chosen by the prompt's ``embeds``
        [N, D]; None when layers ask."""
        if not self.rows:
            return self._pages(None)
        if self._per_layer:
            return None
        summary = self._cache.summaries()[:, : len(self.rows)] if self._by_embedding else None
        return self._choose(-1, None, embeds.float().mean(0, keepdim=True), summary)

    def step(self) -> None:
        """The next token of the answer is about to be read."""
        self._step += 1

    def __call__(self, layer: int, query: torch.Tensor, rotated: torch.Tensor) -> PageList:
        """The pages that ``layer`` reads; ``query`` [N, H, d] before and after its rotation."""
        rule = self._rule
        if layer < rule.dense_layers or (rule.prefill == "dense" and not self._step):
            if self._everything is None:
                self._everything = self._pages(self._all())
            return self._everything
        who = layer if rule.layers == "each" else -1
        if who in self._made:
            step, pages = self._made[who]
            if rule.reuse_steps is None or self._step - step < rule.reuse_steps:
                return pages
        asking = rotated if self._cache.keys.source == "rotated" else query
        if not self._step:
            asking = asking[self._asking]
        return self._choose(who, layer, asking, self._summaries[layer])

    @property
    def frozen(self) -> bool:
        """Whether what will be read is settled once the prompt has been."""
        rule = self._rule
        dense = rule.dense_layers > 0 or rule.prefill == "dense"
        return not self._per_layer or not (dense or rule.reuse_steps is not None)

    def blocks(self) -> tuple[Block, ...]:
        """What must stay in the cache: all candidates until the choice is settled, then what was
        chosen; the system prompt and the last chunk always."""
        if self._tiered:
            here = (block for block, tier in self._tiers.items() if tier is not None)
            return tuple(dict.fromkeys((*self._always, *here)))
        chunks = self.chunks
        if self.frozen and (self._lists or self._uncounted):
            chunks = [entry.block for entry in self.relevance() if entry.share]
        return tuple(dict.fromkeys((*self._always, *chunks)))

    @property
    def everything(self) -> bool:
        """Whether some layer has read every block."""
        return self._everything is not None

    def close(self) -> None:
        """Nothing more will be read."""
        self._holding.close()

    # -- what was read ---------------------------------------------------------------------------

    def tier(self, block: Block) -> str:
        """Where a chunk was read from, or lies; "lost" where its file was, and it was not read."""
        if block in self._tiers:
            return self._tiers[block] or "lost"
        return block.tier if block.state == "committed" else "lost"

    def relevance(self) -> list[Relevance]:
        """Every chunk with candidate rows, in time order. Waits for the device."""
        self._count()
        if not self._chunks:
            return []
        scores = torch.full((len(self.rows),), torch.nan)
        if self._scores:
            heads = [s.reshape(-1, len(self.rows)).mean(0) for s in self._scores.values()]
            scores = torch.stack(heads).mean(0).cpu()
        best = torch.full((len(self._chunks),), -torch.inf).scatter_reduce(
            0, self._chunk_of_row.cpu(), scores.nan_to_num(nan=-torch.inf), "amax"
        )
        best[best == -torch.inf] = torch.nan
        lists = max(1, self._lists)
        return [
            Relevance(block, float(score), hits / lists)
            for block, score, hits in zip(self._chunks, best.tolist(), self._hits)
        ]

    def _count(self) -> None:
        """Adds the choices made since the last call to the counts, on the host."""
        for index in self._uncounted:
            chosen = self._chosen_chunks(index)
            self._lists += chosen.shape[0]
            self._hits = [a + b for a, b in zip(self._hits, chosen.sum(0).tolist())]
        self._uncounted = []

    # -- parts -----------------------------------------------------------------------------------

    @property
    def _by_embedding(self) -> bool:
        return self._rule.summary == "embedding"

    def _candidates(self, chunks: list[Block]) -> Rows:
        cache, size = self._cache, self._cache.cache.page_size
        if cache.keys is None:
            blocks = [block for block in chunks if block.row is not None]
            pages = cache.block_pages()[0][:, : len(blocks)]
        else:
            blocks = cache.keys.rows(chunks)
            pages = cache.keys.table(len(blocks))
        if self._tiered:
            # Pages move: what is chosen enters its own when it has come.
            pages = torch.full_like(pages, -1)
        if self._rule.unit == "page":
            tokens = [
                min(size, block.body_tokens - first)
                for block in dict.fromkeys(blocks)
                for first in range(0, block.body_tokens, size)
            ]
        else:
            tokens = [block.body_tokens for block in blocks]
        return Rows(tuple(blocks), tuple(tokens), pages)

    def _choose(self, who: int, layer: int | None, query, summary) -> PageList:
        asked = Asked(self.rows, self._time_s, layer, self._step, query, summary)
        # Exactly a rule: whoever selects in another way is asked for rows. With tiers the pages are
        # known when the rows have been fetched.
        if type(self._selector) is RuleSelector and not self._tiered:
            table, top = self._selector.select_pages(asked, self._prefix, self._suffix)
            pages = self._shifted(table, top.block_index)
        else:
            top = self._selector.select(asked)
            if not isinstance(top, TopBlocks):
                raise TypeError(
                    f"{type(self._selector).__name__}.select must return TopBlocks, "
                    f"got {type(top).__name__}"
                )
            pages = self._pages(top.block_index)
        self._made[who] = self._step, pages
        self._note(who, top)
        return pages

    def _note(self, who: int, top: TopBlocks) -> None:
        self._scores[who] = top.scores
        self._uncounted.append(top.block_index[0])
        if len(self._uncounted) >= _MOST_UNCOUNTED:
            self._count()

    def _all(self) -> torch.Tensor:
        rows = torch.arange(len(self.rows), dtype=torch.int32, device=self._prefix.device)
        return rows.unsqueeze(0)

    def _pages(self, index: torch.Tensor | None) -> PageList:
        """Pages in logical order for rows ``index`` [1, (R,) K]; None: there are no rows."""
        if index is None:
            table = torch.cat((self._prefix, self._suffix), dim=1)
        else:
            if self._tiered:
                self._bring(index)
            table = select_pages(
                index, self.rows.pages, self._prefix, self._suffix, backend=self._backend
            )
        return self._shifted(table, index)

    def _shifted(self, table: torch.Tensor, index: torch.Tensor | None) -> PageList:
        shift = None
        if self._rebase is not None:
            chosen = None if index is None else self._chosen_chunks(index[0])
            shift = self._rebase(table, chosen)
        return PageList(table, shift)

    def _bring(self, index: torch.Tensor) -> None:
        """The chunks of the rows ``index`` get pages, which enter the table."""
        rows = sorted({row for row in index.flatten().tolist() if 0 <= row < len(self.rows)})
        new = [b for b in dict.fromkeys(self.rows.blocks[row] for row in rows)]
        new = [block for block in new if block not in self._tiers]
        self._fetch(new)
        for block in new:
            self._show(block)

    def _fetch(self, blocks: Sequence[Block]) -> None:
        # What was lost since the question began (engine.allow_missing) is read around.
        self._tiers.update((block, None) for block in blocks if block.state == "evicted")
        blocks = [block for block in blocks if block.state != "evicted"]
        found = self._cache.fetch(blocks)
        self._tiers.update(zip(blocks, found))
        here = [block for block, tier in zip(blocks, found) if tier is not None]
        self._holding.enter_context(self._cache.hold(here))

    def _show(self, block: Block) -> None:
        rows, ids = self._place.get(block), block.body_ids
        if not rows or not len(ids):
            return
        if self._rule.unit == "page":
            self.rows.pages[0, rows[0] : rows[-1] + 1, 0] = ids.to(torch.int32)
        else:
            self.rows.pages[0, rows[0], : len(ids)] = ids.to(torch.int32)
        if self._rebase is not None:
            self._rebase.place(ids, self._chunk_of_row[rows[0]])

    def _chosen_chunks(self, index: torch.Tensor) -> torch.Tensor:
        """[R, C] bool: the chunks that have a row in each list of ``index`` [(R,) K]."""
        index = index.reshape(math.prod(index.shape[:-1]), index.shape[-1]).long()
        chunks = len(self._chunks)
        inside = (index >= 0) & (index < len(self.rows))
        chunk = self._chunk_of_row[index.clamp(0, len(self.rows) - 1)]
        marks = torch.zeros(index.shape[0], chunks + 1, dtype=torch.bool, device=index.device)
        marks.scatter_(1, chunk.masked_fill(~inside, chunks), True)
        return marks[:, :chunks]
