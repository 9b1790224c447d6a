"""A model of the cache, driven by Hypothesis: whatever is done in whatever order, every live token
is listed exactly once and in order, evicted ones never, and no page has two owners."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from cache_kit import make_cache
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vicostream_kernels.cache import (
    Block,
    CacheClosed,
    CacheStream,
    DoubleFree,
    ForeignStream,
    OutOfPages,
    StaleBlock,
)

PAGE = 3
PAGES, MAX_PAGES = 8, 20


@dataclass(eq=False)
class Known:
    """What the model knows of a block: the ids of its tokens, in order, and its pages."""

    block: Block
    stream: CacheStream
    pages: int
    tokens: list[int] | None = None  # None until the plan
    order: int | None = None  # None until the commit
    summary: float | None = None

    @property
    def chunk(self) -> bool:
        return self.block.kind == "chunk"


@dataclass
class Model:
    live: list[Known] = field(default_factory=list)
    gone: list[Known] = field(default_factory=list)
    streams: list[CacheStream] = field(default_factory=list)
    closed: list[CacheStream] = field(default_factory=list)
    evicted: dict[CacheStream, tuple[int, int]] = field(default_factory=dict)
    total: int = PAGES

    @property
    def free(self) -> int:
        return self.total - sum(k.pages for k in self.live)

    def committed(self, stream: CacheStream) -> list[Known]:
        mine = [k for k in self.live if k.stream is stream and k.order is not None]
        return sorted(mine, key=lambda k: k.order)


def pages_of(n: int) -> int:
    return -(-n // PAGE)


class CacheMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(["error", "evict_oldest", "grow", "grow, evict_oldest"]))
    def start(self, policy: str) -> None:
        grow = {"grow": True, "max_pages": MAX_PAGES} if "grow" in policy else {}
        self.evicts = "evict" in policy
        self.limit = MAX_PAGES if grow else PAGES
        on_full = "evict_oldest" if self.evicts else "error"
        self.cache = make_cache(pages=PAGES, page_size=PAGE, on_full=on_full, **grow)
        self.cache.k_pages.fill_(-1.0)
        self.cache.v_pages.fill_(-1.0)
        self.model = Model()
        self.token = itertools.count()
        self.order = itertools.count()
        self.peak = 0
        self.open()

    # -- the model's own account of what a request for pages does --------------------------------

    def request(self, stream: CacheStream, n: int, call):
        """Runs ``call``, which needs ``n`` pages, and holds it to what the model expects."""
        model = self.model
        total, free = model.total, model.free
        while free < n and total < self.limit:
            grown = min(2 * total, self.limit)
            total, free = grown, free + grown - total
        victims = []
        if self.evicts:
            chunks = [k for k in model.live if k.chunk and k.order is not None]
            chunks = [k for k in chunks if not k.block.pinned]
            for victim in sorted(chunks, key=lambda k: (k.stream is not stream, k.order)):
                if free >= n:
                    break
                victims.append(victim)
                free += victim.pages
        if free < n:
            with pytest.raises(OutOfPages):
                call()
            return None
        result = call()
        model.total = total
        for victim in victims:
            assert victim.block.state == "evicted"
            self.forget(victim, evicted=True)
        return result

    def forget(self, known: Known, evicted: bool = False) -> None:
        self.model.live.remove(known)
        self.model.gone.append(known)
        if evicted:
            chunks, tokens = self.model.evicted[known.stream]
            self.model.evicted[known.stream] = chunks + 1, tokens + len(known.tokens)

    def write(self, slots: torch.Tensor, tokens: list[int]) -> None:
        """What rope_append does with slots: here the key is the token's id."""
        keys = self.cache.k_pages.view(-1, 8)
        values = self.cache.v_pages.view(-1, 8)
        for slot, token in zip(slots.tolist(), tokens):
            assert 0 <= slot < len(keys)
            keys[slot], values[slot] = token, token
        assert slots[len(tokens) :].tolist() == [-1] * (len(slots) - len(tokens))

    def summarise(self, known: Known) -> None:
        known.summary = float(next(self.token))
        known.stream.set_summary(known.block, torch.tensor([known.summary, 0.5]))

    def pick(self, data: st.DataObject, *, reserved: bool | None = None) -> Known | None:
        """A live block (of any state, reserved, or committed)."""
        fitting = [k for k in self.model.live if reserved is None or (k.order is None) == reserved]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    # -- rules -----------------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: len(self.model.streams) < 3)
    def open(self) -> None:
        stream = self.cache.open()
        self.model.streams.append(stream)
        self.model.evicted[stream] = (0, 0)

    @rule(
        data=st.data(),
        bucket=st.integers(0, 9),
        kind=st.sampled_from(["chunk", "chunk", "chunk", "text", "sink"]),
        markers=st.sampled_from([(0, 0), (1, 1), (1, 0), (4, 2)]),
        pinned=st.sampled_from([False, False, False, True]),
    )
    @precondition(lambda self: self.model.streams)
    def reserve(self, data, bucket, kind, markers, pinned) -> None:
        stream = data.draw(st.sampled_from(self.model.streams))
        bucket = bucket or 1
        n = sum(map(pages_of, (markers[0], bucket, markers[1])))
        options = {"kind": kind, "markers": markers, "pinned": pinned}
        block = self.request(stream, n, lambda: stream.reserve(bucket, **options))
        if block is not None:
            assert len(block.pages) == n and block.pinned == (pinned or kind == "sink")
            self.model.live.append(Known(block, stream, n))

    @rule(data=st.data(), on_device=st.booleans(), padding=st.integers(0, 3))
    def plan(self, data, on_device, padding) -> None:
        known = self.pick(data, reserved=True)
        if known is None:
            return
        block, markers = known.block, sum(known.block.markers)
        count = data.draw(st.integers(0, block.bucket))
        rows = markers + count + padding
        given = torch.tensor(count, dtype=torch.int32) if on_device else count
        slots = known.stream.plan(block, given, rows)
        known.tokens = [next(self.token) for _ in range(markers + count)]
        assert len(slots) == rows
        self.write(slots, known.tokens)

    @rule(data=st.data(), summarise=st.booleans())
    def commit(self, data, summarise) -> None:
        planned = [k for k in self.model.live if k.order is None and k.tokens is not None]
        if not planned:
            return
        known = data.draw(st.sampled_from(planned))
        lead, trail = known.block.markers
        count = len(known.tokens) - lead - trail
        known.stream.commit(known.block, count)
        known.order = next(self.order)
        known.pages = sum(map(pages_of, (lead, count, trail)))
        if known.chunk and summarise:
            self.summarise(known)

    @rule(data=st.data(), n=st.integers(1, 5))
    def append_tokens(self, data, n) -> None:
        texts = [
            k
            for k in self.model.live
            if k.order is not None and k.block.kind == "text" and not k.block.markers[1]
        ]
        if not texts:
            return
        known = data.draw(st.sampled_from(texts))
        lead = known.block.markers[0]
        body = len(known.tokens) - lead
        grown = pages_of(lead) + pages_of(body + n)
        call = lambda: known.stream.append_tokens(known.block, n)  # noqa: E731
        slots = self.request(known.stream, grown - known.pages, call)
        if slots is not None:
            new = [next(self.token) for _ in range(n)]
            self.write(slots, new)
            known.tokens, known.pages = known.tokens + new, grown

    @rule(data=st.data())
    def set_summary(self, data) -> None:
        chunks = [k for k in self.model.live if k.chunk]
        if chunks:
            self.summarise(data.draw(st.sampled_from(chunks)))

    @rule(data=st.data())
    def pin(self, data) -> None:
        if known := self.pick(data):
            known.block.pinned = not known.block.pinned

    @rule(data=st.data())
    def give_back(self, data) -> None:
        if not (known := self.pick(data)):
            return
        block = known.block
        if known.order is None:
            known.stream.rollback(block)
        elif known.chunk and not block.pinned:
            known.stream.evict(block)
        else:
            known.stream.free(block)
        self.forget(known, evicted=block.state == "evicted")

    @rule(data=st.data())
    def give_back_twice(self, data) -> None:
        gone = [k for k in self.model.gone if not k.stream.closed]
        if gone:
            known = data.draw(st.sampled_from(gone))
            with pytest.raises(DoubleFree):
                data.draw(
                    st.sampled_from([known.stream.evict, known.stream.free, known.stream.rollback])
                )(known.block)
            with pytest.raises(StaleBlock):
                known.stream.page_table([known.block])

    @rule(data=st.data())
    @precondition(lambda self: len(self.model.streams) > 1)
    def give_to_a_foreign_stream(self, data) -> None:
        if known := self.pick(data):
            others = [s for s in self.model.streams if s is not known.stream]
            stream = data.draw(st.sampled_from(others))
            with pytest.raises(ForeignStream):
                data.draw(st.sampled_from([stream.evict, stream.free, stream.rollback]))(
                    known.block
                )

    @rule(data=st.data())
    @precondition(lambda self: len(self.model.streams) > 1)
    def close(self, data) -> None:
        stream = data.draw(st.sampled_from(self.model.streams))
        stream.close()
        self.model.streams.remove(stream)
        self.model.closed.append(stream)
        for known in [k for k in self.model.live if k.stream is stream]:
            self.forget(known)
        with pytest.raises(CacheClosed):
            stream.reserve(1)

    # -- invariants ------------------------------------------------------------------------------

    def read(self, stream: CacheStream, blocks: list[Block]) -> list[float]:
        """Token ids in the order in which attention would see them."""
        table = stream.page_table(blocks)[0].tolist()
        fill = self.cache.page_fill.tolist()
        keys = self.cache.k_pages[0, :, :, 0, 0].tolist()
        values = self.cache.v_pages[0, :, :, 0, 7].tolist()
        listed = [token for page in table for token in keys[page][: fill[page]]]
        assert listed == [token for page in table for token in values[page][: fill[page]]]
        return listed

    @invariant()
    def every_live_token_is_listed_once_and_in_order(self) -> None:
        seen = []
        for stream in self.model.streams:
            committed = self.model.committed(stream)
            assert stream.blocks == [k.block for k in committed]
            assert stream.chunks == [k.block for k in committed if k.chunk]
            assert stream.sinks == [k.block for k in committed if k.block.kind == "sink"]
            expected = [token for k in committed for token in k.tokens]
            listed = self.read(stream, stream.blocks)
            assert listed == expected
            assert stream.tokens == len(expected)
            seen += listed
        for known in self.model.live:
            if known.order is None:
                tokens = self.read(known.stream, [known.block])
                assert tokens == (known.tokens or [])
                seen += tokens
        assert len(seen) == len(set(seen))
        assert int(self.cache.page_fill.sum()) == len(seen)

    @invariant()
    def no_page_has_two_owners(self) -> None:
        owned = [page for k in self.model.live for page in k.block.pages]
        assert len(owned) == len(set(owned)) == self.cache.used_pages
        assert self.cache.free_pages == self.model.free
        assert self.cache.free_pages + self.cache.used_pages == self.cache.total_pages
        assert self.cache.total_pages == self.model.total == len(self.cache.page_fill)
        assert self.cache.bytes == len(owned) * self.cache.bytes_per_page
        self.peak = max(self.peak, self.cache.bytes)
        assert self.cache.peak_bytes == self.peak <= self.cache.pool_bytes

    @invariant()
    def free_pages_hold_nothing(self) -> None:
        owned = {page for k in self.model.live for page in k.block.pages}
        filled = self.cache.page_fill.nonzero().flatten().tolist()
        assert set(filled) <= owned
        assert all(k.block.pages == [] for k in self.model.gone)

    @invariant()
    def forgotten_counts_what_was_evicted(self) -> None:
        for stream, counts in self.model.evicted.items():
            assert (stream.forgotten.chunks, stream.forgotten.tokens) == counts

    def check_rows(self) -> None:
        """Reading the tables moves rows up, so it is a rule: histories without a read count too."""
        for stream in self.model.streams:
            committed = self.model.committed(stream)
            chunks = [k for k in committed if k.chunk and k.block.body_tokens]
            table, rows = stream.block_pages()
            assert rows == len(chunks) == table.shape[1]
            for known, row in zip(chunks, table[0].tolist()):
                assert [p for p in row if p >= 0] == known.block.body.pages
            assert [k.block.row for k in chunks] == list(range(rows))
            assert all(k.block.row is None for k in self.model.live + self.model.gone if
                       k.stream is stream and k not in chunks)  # fmt: skip
            if any(k.summary is None for k in chunks):
                with pytest.raises(ValueError, match="have no summary"):
                    stream.summaries()
            else:
                vectors = stream.summaries()[0].tolist()
                assert vectors == [[k.summary, 0.5] for k in chunks]

    @rule()
    def read_rows(self) -> None:
        self.check_rows()

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.check_rows()
        self.cache.close()
        assert self.cache.used_pages == 0 and all(s.closed for s in self.model.streams)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
