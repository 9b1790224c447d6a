"""A model of the tiers, driven by Hypothesis: whatever goes down, comes up or is dropped, in
whatever order, every live token is in exactly one tier, unchanged, and every tier in its budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from cache_kit import make_cache
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vicostream_kernels.cache import Block, CacheStream, NotResident, OutOfPages, Tiers

PAGE = 3
#: Page 3 tokens x 2 layers x 2 pools x 8 floats: 384 bytes; a token 128 bytes.
PAGES = 14
MEMORY = PAGES * 384 * 8 // 7  # an eighth is for rows
SETTINGS = {
    "disk": Tiers(memory_bytes=MEMORY + 2 * 1000, group_bytes=1000),
    "little disk": Tiers(memory_bytes=MEMORY + 2 * 1000, group_bytes=1000, disk_bytes=5000),
    "host": Tiers(memory_bytes=MEMORY, host_bytes=4000, disk_bytes=0, group_bytes=1000),
    "host, disk": Tiers(memory_bytes=MEMORY, host_bytes=3000, disk_bytes=6000, group_bytes=999),
}


@dataclass(eq=False)
class Known:
    block: Block
    stream: CacheStream
    tokens: list[int]

    @property
    def live(self) -> bool:
        return self.block.state == "committed"


class TierMachine(RuleBasedStateMachine):
    @initialize(which=st.sampled_from(list(SETTINGS)), unit=st.sampled_from(["chunk", "page", ""]))
    def start(self, which: str, unit: str) -> None:
        self.tiers, self.unit = SETTINGS[which], unit
        self.cache = make_cache(pages=1000, page_size=PAGE, layers=2, tiers=self.tiers)
        self.known: list[Known] = []
        self.held: list = []
        self.token = itertools.count(1)
        self.open()

    def open(self) -> None:
        stream = self.cache.open()
        if self.unit:
            stream.keep_keys(unit=self.unit)

    def live(self, chunks: bool = False) -> list[Known]:
        return [k for k in self.known if k.live and (not chunks or k.block.kind == "chunk")]

    def write(self, slots: torch.Tensor, tokens: list[int]) -> None:
        for layer in range(2):
            for sign, pool in ((1, self.cache.k_pages), (-1, self.cache.v_pages)):
                flat = pool[layer].view(-1, 8)
                for slot, token in zip(slots.tolist(), tokens):
                    flat[slot] = sign * (token + layer / 4)

    # -- rules -----------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        count=st.integers(0, 9),
        markers=st.sampled_from([(1, 1), (0, 0), (4, 2)]),
        kind=st.sampled_from(["chunk", "chunk", "chunk", "text"]),
        pinned=st.sampled_from([False, False, False, False, True]),
    )
    def add(self, data, count, markers, kind, pinned) -> None:
        stream = data.draw(st.sampled_from(self.cache.streams))
        try:
            block = stream.reserve(max(count, 1), kind=kind, markers=markers, pinned=pinned)
        except OutOfPages:
            return
        tokens = [next(self.token) for _ in range(count + sum(markers))]
        self.write(stream.plan(block, count, len(tokens)), tokens)
        stream.commit(block, count)
        if block.state == "committed" and kind == "chunk":
            stream.set_summary(block, torch.tensor([float(len(tokens)), 1.0]))
        self.known.append(Known(block, stream, tokens))

    @rule(data=st.data(), n=st.integers(1, 5))
    def fetch(self, data, n) -> None:
        if not (live := self.live()):
            return
        stream = data.draw(st.sampled_from([k.stream for k in live]))
        mine = [k.block for k in live if k.stream is stream]
        blocks = data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=n))
        before = [block.tier for block in blocks]
        try:
            found = stream.fetch(blocks)
        except OutOfPages:
            return
        for block, name, old in zip(blocks, found, before):
            assert block.tier == "memory" and bool(block.pages) == bool(block.tokens)
            # Meanwhile a file may have been completed.
            assert name == old or (old, name) in {("memory", "disk"), ("host", "disk")}

    @rule(data=st.data())
    def spill(self, data) -> None:
        able = [k for k in self.live(chunks=True) if not (k.block.pinned or k.block._holds)]
        if able:
            stream = data.draw(st.sampled_from([k.stream for k in able]))
            mine = [k.block for k in able if k.stream is stream]
            blocks = data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=4))
            stream.spill(blocks)
            assert all(b.pages == [] for b in blocks)
            away = [b for b in blocks if b.state == "committed" and b.tier != "memory"]
            for block in away:
                with pytest.raises(NotResident):
                    stream.page_table([block])

    @rule(data=st.data())
    def pin(self, data) -> None:
        if live := self.live(chunks=True):
            known = data.draw(st.sampled_from(live))
            known.block.pinned = not known.block.pinned and not known.block._away

    @rule(data=st.data(), resident=st.booleans())
    @precondition(lambda self: len(self.held) < 3)
    def hold(self, data, resident) -> None:
        if live := self.live():
            known = data.draw(st.sampled_from(live))
            holding = known.stream.hold([known.block], resident=resident)
            holding.__enter__()
            self.held.append((known, holding))

    @rule()
    @precondition(lambda self: self.held)
    def let_go(self) -> None:
        known, holding = self.held.pop(0)
        holding.__exit__(None, None, None)

    @rule(data=st.data())
    def give_back(self, data) -> None:
        able = [k for k in self.live() if not k.block._keeps]
        if able:
            known = data.draw(st.sampled_from(able))
            known.stream.free(known.block)

    @rule()
    def settle(self) -> None:
        self.cache.settle()
        assert not self.cache._residency.below._writing

    @rule()
    @precondition(lambda self: len(self.cache.streams) < 2)
    def open_another(self) -> None:
        self.open()

    @rule(data=st.data())
    @precondition(lambda self: len(self.cache.streams) > 1 and not self.held)
    def close(self, data) -> None:
        data.draw(st.sampled_from(self.cache.streams)).close()

    # -- invariants ------------------------------------------------------------------------------

    def expected(self, known: Known) -> torch.Tensor:
        tokens = torch.tensor(known.tokens, dtype=torch.float32).view(1, 1, -1, 1, 1)
        layers = torch.arange(2).view(2, 1, 1, 1, 1) / 4
        signs = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
        return ((tokens + layers) * signs).expand(2, 2, -1, 1, 8)

    @invariant()
    def every_live_token_is_in_one_tier_unchanged(self) -> None:
        for known in self.live():
            assert torch.equal(known.stream.contents(known.block), self.expected(known))
            pages, needed = known.block.pages, sum(map(self.cache.pages_for, known.block.counts))
            assert len(pages) == (0 if known.block._away else needed)
            if not known.block._away:
                table = known.stream.page_table([known.block])
                fill = self.cache.page_fill[table[0].long()].tolist()
                assert sum(fill) == len(known.tokens)

    @invariant()
    def what_was_pinned_or_held_has_not_moved(self) -> None:
        for known, _ in self.held:
            assert known.live
        assert not any(k.block.pinned and k.block._away for k in self.live())

    @invariant()
    def every_tier_is_in_its_budget(self) -> None:
        self.cache.make_room(0)  # what was unpinned, or new tables, may have left it beyond
        found = self.cache.tier_bytes()
        for name, (used, budget) in found.items():
            if name == "memory":
                continue  # below: rows of tables may come after what is pinned
            kept = any(k.block._keeps for k, _ in self.held)
            assert budget is None or used <= budget or kept, (name, used, budget)
        residency = self.cache._residency
        assert self.cache.used_pages <= self.cache.total_pages
        movable = [
            k for k in self.live(chunks=True) if k.block.pages and not k.block.pinned
            and not k.block._holds
        ]  # fmt: skip
        assert residency.headroom() >= 0 or not movable
        groups = residency.below._groups
        on_disk = sum(g.file_bytes for g in groups if g.path is not None or g.writing is not None)
        assert residency.below.disk_bytes == on_disk + sum(
            g.file_bytes for g in residency.below._writing if g not in groups
        )

    @invariant()
    def rows_follow_the_pages(self) -> None:
        for stream in self.cache.streams:
            rows = [b for b in stream.chunks if b.body_tokens]
            table, n = stream.block_pages()
            assert n == len(rows)
            for block, row in zip(rows, table[0].tolist()):
                assert [p for p in row if p >= 0] == block.body.pages
            vectors = stream.summaries()[0].tolist()
            assert vectors == [[float(b.tokens), 1.0] for b in rows]
            if stream.keys is not None:
                owner = stream.keys.rows(stream.chunks)
                listed = stream.keys.table(len(owner))[0].tolist()
                for block in rows:
                    of = [i for i, b in enumerate(owner) if b is block]
                    assert [p for i in of for p in listed[i] if p >= 0] == block.body.pages
                    first = stream.keys._start
                    for place, page in enumerate(block.body.pages):
                        row = of[place] if self.unit == "page" else of[0]
                        assert int(stream.keys.block_of_page[page]) == first + row

    @invariant()
    def what_is_dropped_is_counted(self) -> None:
        for stream in self.cache.streams:
            gone = [k for k in self.known if k.stream is stream and k.block.state == "evicted"]
            assert stream.forgotten.chunks == len(gone)
            assert stream.forgotten.tokens == sum(len(k.tokens) for k in gone)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
