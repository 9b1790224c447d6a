"""PagedKVCache: placement of tokens, page tables, rows of chunks, and what goes when it is full."""

from __future__ import annotations

import pytest
import torch
from cache_kit import add, fills, make_cache

from vicostream_kernels.cache import OutOfPages


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("markers", [(0, 0), (1, 1), (5, 0), (0, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 10])
def test_plan_places_rows_in_order_on_pages_of_their_own(markers, count, as_tensor):
    cache = make_cache(pages=11, page_size=3)
    cache.open().reserve(4)  # so that the ids below do not begin with 0
    stream = cache.open()
    block = stream.reserve(10, markers=markers)
    lead, body, trail = (segment.pages for segment in block.segments)
    rows = markers[0] + 10 + markers[1] + 2
    slots = stream.plan(block, torch.tensor(count, dtype=torch.int32) if as_tensor else count, rows)

    def places(pages, n):
        return [pages[i // 3] * 3 + i % 3 for i in range(n)]

    expected = places(lead, markers[0]) + places(body, count) + places(trail, markers[1])
    assert slots.dtype == torch.int32
    assert slots.tolist() == expected + [-1] * (rows - len(expected))
    fill = cache.page_fill.tolist()
    for pages, n in ((lead, markers[0]), (body, count), (trail, markers[1])):
        assert [fill[p] for p in pages] == [min(max(n - 3 * i, 0), 3) for i in range(len(pages))]
    assert sum(fill) == len(expected)


def test_plan_never_writes_more_than_the_room():
    """A device count that is too large must not claim slots that no row was written to."""
    cache = make_cache()
    stream = cache.open()
    block = stream.reserve(8, markers=(1, 1))
    slots = stream.plan(block, torch.tensor([50]), rows=7)
    assert (slots >= 0).all() and int(cache.page_fill.sum()) == 7
    with pytest.raises(ValueError, match="count=6 must be from 0 to 5"):
        stream.commit(block, 6)
    stream.plan(block, torch.tensor(-3), rows=10)
    assert int(cache.page_fill.sum()) == 2


def test_commit_gives_unused_body_pages_back():
    cache = make_cache(pages=10, page_size=4)
    stream = cache.open()
    block = stream.reserve(20, markers=(1, 1), start_s=1.0, end_s=2.0)
    assert (cache.used_pages, block.tokens, stream.tokens) == (7, None, 0)
    lead, body, trail = (list(segment.pages) for segment in block.segments)
    stream.plan(block, 5, 22)
    stream.commit(block, 5)
    assert (cache.used_pages, block.tokens, block.body_tokens, stream.tokens) == (4, 7, 5, 7)
    assert block.pages == lead + body[:2] + trail
    assert stream.page_table([block]).tolist() == [block.pages]
    assert stream.page_table([block], markers=False).tolist() == [body[:2]]
    assert stream.blocks == stream.chunks == [block]


def test_commit_compares_the_count_with_the_plan(monkeypatch):
    stream = make_cache().open()
    block = stream.reserve(8)
    with pytest.raises(ValueError, match="planned first"):
        stream.commit(block, 3)
    stream.plan(block, 3, 8)
    with pytest.raises(ValueError, match="count=2 .* the plan placed 3"):
        stream.commit(block, 2)
    stream.plan(block, torch.tensor(4), 8)
    monkeypatch.setattr("vicostream_kernels.checks.CHECK_VALUES", True)
    with pytest.raises(ValueError, match="count=5 .* the plan placed 4"):
        stream.commit(block, 5)
    stream.commit(block, 4)
    assert block.tokens == 4


def test_pages_given_back_hold_nothing_even_when_the_plan_filled_them():
    cache = make_cache()
    stream = cache.open()
    block = stream.reserve(12)
    stream.plan(block, torch.tensor(12), 12)
    unused = block.pages[1:]
    stream.commit(block, 3)
    assert not cache.page_fill[unused].any() and cache.used_pages == 1


def test_text_grows_token_by_token():
    cache = make_cache(pages=6, page_size=4)
    stream = cache.open()
    block = add(stream, 3, kind="text")
    other = add(stream, 4, kind="text")
    assert (cache.used_pages, stream.append_tokens(block).tolist()) == (2, [block.pages[0] * 4 + 3])
    first = stream.append_tokens(block)
    assert cache.used_pages == 3 and first.tolist() == [block.pages[1] * 4]
    more = stream.append_tokens(block, 9)
    places = [block.pages[i // 4] * 4 + i % 4 for i in range(5, 14)]
    assert more.tolist() == places and more.dtype == torch.int32
    assert fills(cache, block) == [4, 4, 4, 2] and fills(cache, other) == [4]
    assert (block.tokens, stream.tokens) == (14, 18)
    assert stream.page_table([block, other]).tolist() == [block.pages + other.pages]
    with pytest.raises(OutOfPages, match=r"append_tokens\(n=7\)"):
        stream.append_tokens(block, 7)
    assert (block.tokens, fills(cache, block), cache.free_pages) == (14, [4, 4, 4, 2], 1)


def test_page_table_lists_blocks_in_the_order_given():
    cache = make_cache(pages=12)
    stream = cache.open()
    sink, a = add(stream, 5, kind="sink"), add(stream, 6, markers=(1, 1))
    pending = stream.reserve(4)
    table = stream.page_table([a, sink, pending])
    assert table.dtype == torch.int32
    assert table.tolist() == [a.pages + sink.pages + pending.pages]
    assert stream.page_table([]).shape == (1, 0)
    with pytest.raises(ValueError, match="twice"):
        stream.page_table([a, sink, a])


def test_free_pages_have_no_fill_however_they_came_back():
    cache = make_cache(pages=20)
    stream = cache.open()
    sink, chunk, text = (add(stream, 7, kind=k) for k in ("sink", "chunk", "text"))
    pending = stream.reserve(9, markers=(1, 0))
    stream.plan(pending, 9, 10)
    for give_back, block in (
        (stream.evict, chunk),
        (stream.free, text),
        (stream.rollback, pending),
        (stream.free, sink),
    ):
        stale = block.pages
        give_back(block)
        assert not cache.page_fill[stale].any()
        assert block.pages == [] and not block.body_ids.numel()
    assert (cache.free_pages, stream.tokens, stream.blocks, stream.sinks) == (20, 0, [], [])
    add(stream, 7), stream.plan(stream.reserve(4), 4, 4)
    stream.close()
    assert not cache.page_fill.any() and cache.free_pages == 20


# -- rows of chunks ------------------------------------------------------------------------------


def test_block_pages_hold_body_pages_in_time_order():
    cache = make_cache(pages=30, page_size=4)
    stream = cache.open()
    assert stream.block_pages()[1] == 0 and stream.summaries().shape == (1, 0, 0)
    add(stream, 4, kind="sink")
    a, b, c = (add(stream, n, bucket=12, markers=(1, 1)) for n in (9, 2, 5))
    add(stream, 3, kind="text")
    table, n = stream.block_pages()
    assert (table.dtype, tuple(table.shape), n) == (torch.int32, (1, 3, 3), 3)
    assert [[p for p in row if p >= 0] for row in table[0].tolist()] == [
        x.body.pages for x in (a, b, c)
    ]
    assert [x.row for x in (a, b, c)] == [0, 1, 2]
    stream.evict(b)
    assert table[0, 1].tolist() == [-1, -1, -1], "a view taken before shows the eviction"
    assert (a.row, b.row, stream.block_pages()[1], c.row) == (0, None, 2, 1)
    wide = add(stream, 17, bucket=17)
    table, n = stream.block_pages()
    assert n == 3 and table.shape[2] >= 5 and wide.row == 2
    assert [[p for p in row if p >= 0] for row in table[0].tolist()] == [
        x.body.pages for x in (a, c, wide)
    ]


def test_a_chunk_that_kept_nothing_has_no_row():
    """topk_blocks would otherwise spend one of its k on it."""
    stream = make_cache().open()
    empty = stream.reserve(4, markers=(1, 1))
    stream.set_summary(empty, torch.ones(3))
    stream.plan(empty, 0, 6)
    stream.commit(empty, 0)
    stream.set_summary(empty, torch.ones(3))
    assert stream.chunks == [empty] and empty.row is None and empty.tokens == 2
    assert stream.block_pages()[1] == 0 and stream.summaries().shape == (1, 0, 3)
    stream.evict(empty)
    assert stream.chunks == [] and stream.forgotten.chunks == 1


def test_summaries_follow_their_blocks():
    stream = make_cache(pages=40).open()
    blocks = []
    for i in range(20):  # beyond the first capacity of the tables
        block = stream.reserve(4)
        if i % 2:
            stream.set_summary(block, torch.full((6,), float(i), dtype=torch.bfloat16))
        stream.plan(block, 2, 4)
        stream.commit(block, 2)
        if not i % 2:
            with pytest.raises(ValueError, match=f"1 of {i + 1} chunks have no summary"):
                stream.summaries()
            stream.set_summary(block, torch.full((6,), float(i)))
        blocks.append(block)
    assert stream.summaries().dtype == torch.float32
    assert stream.summaries()[0, :, 5].tolist() == list(range(20))
    stream.set_summary(blocks[7], torch.full((6,), 99.0))
    for i in (0, 1, 5, 19):
        stream.evict(blocks[i])
    kept = [99.0 if i == 7 else i for i in range(20) if i not in (0, 1, 5, 19)]
    assert stream.summaries()[0, :, 0].tolist() == kept
    assert stream.block_pages()[1] == 16
    assert stream.summaries()[0, blocks[7].row, 0] == 99


def test_an_evicted_chunk_needs_no_summary():
    stream = make_cache().open()
    without, block = add(stream, 3), add(stream, 3)
    stream.set_summary(block, torch.ones(2))
    with pytest.raises(ValueError, match="1 of 2 chunks"):
        stream.summaries()
    stream.evict(without)
    assert stream.summaries().tolist() == [[[1.0, 1.0]]]


def test_forgetting_the_oldest_rebuilds_nothing():
    stream = make_cache().open()
    for _ in range(6):
        add(stream, 3)
    tables = stream._table.pages
    for left in (5, 4, 3):
        stream.evict(stream.chunks[0])
        assert stream.block_pages()[1] == left and stream.chunks[0].row == 0
    assert stream._table.pages is tables
    stream.evict(stream.chunks[1])
    assert stream.block_pages()[1] == 2 and stream._table.pages is not tables


def test_a_list_of_blocks_may_shrink_while_it_is_walked():
    stream = make_cache().open()
    for _ in range(5):
        add(stream, 3)
    for block in stream.chunks:
        stream.evict(block)
    assert stream.chunks == stream.blocks == []


def test_a_bad_summary_changes_nothing():
    stream = make_cache().open()
    block, text = add(stream, 3), add(stream, 3, kind="text")
    for vector, error in (
        ([1.0], TypeError),
        (torch.ones(3, dtype=torch.int32), TypeError),
        (torch.ones(1, 3), ValueError),
        (torch.ones(0), ValueError),
        (torch.ones(3, device="meta"), ValueError),
    ):
        with pytest.raises(error, match="vector"):
            stream.set_summary(block, vector)
    with pytest.raises(ValueError, match="must be a chunk"):
        stream.set_summary(text, torch.ones(3))
    stream.set_summary(block, torch.ones(3))
    with pytest.raises(ValueError, match=r"must be \[3\]"):
        stream.set_summary(block, torch.ones(4))
    assert stream.summaries().tolist() == [[[1.0, 1.0, 1.0]]]


def test_a_growing_history_rewrites_its_tables_rarely():
    """Rows are written in place; a rebuild happens only when the capacity doubles."""
    stream = make_cache(pages=8, grow=True).open()
    places = []
    for i in range(600):
        stream.set_summary(add(stream, 3), torch.full((2,), float(i)))
        if not places or places[-1] is not stream._table.pages:
            places.append(stream._table.pages)
    assert len(places) <= 8
    assert stream.summaries()[0, :, 1].tolist() == list(range(600))


def test_a_bounded_history_keeps_bounded_tables():
    """What is forgotten leaves the tables too: nothing grows with the length of the stream."""
    cache = make_cache(pages=24, on_full="evict_oldest")
    stream = cache.open()
    keep = add(stream, 3, pinned=True)
    stream.set_summary(keep, torch.tensor([-1.0]))
    for i in range(500):
        stream.set_summary(add(stream, 3), torch.tensor([float(i)]))
    assert stream._table.pages.shape[0] <= 64 and len(stream.forgotten.last) <= 64
    assert stream.forgotten.chunks == 500 - 23 and stream.forgotten.tokens == 3 * 477
    assert stream.summaries()[0, :, 0].tolist() == [-1.0, *range(477, 500)]


# -- full ----------------------------------------------------------------------------------------


def test_out_of_pages_says_everything_and_changes_nothing():
    cache = make_cache(pages=8, page_size=4)
    stream, other = cache.open(), cache.open()
    add(stream, 4, kind="sink"), add(stream, 8), add(other, 4, kind="text")
    stream.reserve(4)
    with pytest.raises(OutOfPages) as caught:
        stream.reserve(12, markers=(1, 1))
    message = str(caught.value)
    for part in (
        "reserve(chunk, bucket=12, markers=(1, 1)): 5 pages of 4 tokens asked",
        "3 of 8 are free (on_full='error', at most 8 pages)",
        "2 stream(s)",
        "1 in sinks",
        "2 in chunks that could be evicted",
        "1 reserved, not committed",
        "1 in texts",
        "on_full='evict_oldest'",
        "grow=True",
    ):
        assert part in message
    assert cache.free_pages == 3 and int(cache.page_fill.sum()) == 16
    with pytest.raises(OutOfPages, match="a cache of at least 9 pages"):
        stream.reserve(36)


def test_evict_oldest_takes_its_own_oldest_then_the_others():
    cache = make_cache(pages=8, page_size=4, on_full="evict_oldest")
    a, b = cache.open(), cache.open()
    b0 = add(b, 4, start_s=0, end_s=1)
    pinned = add(a, 4, pinned=True)
    a1, a2 = add(a, 4, start_s=1, end_s=2), add(a, 4, start_s=2, end_s=3)
    b1 = add(b, 4)
    sink, text, pending = add(a, 4, kind="sink"), add(a, 4, kind="text"), a.reserve(4)
    assert cache.free_pages == 0
    a.append_tokens(text)
    assert (a1.state, a2.state, b0.state) == ("evicted", "committed", "committed")
    with b.hold([b0]):
        with pytest.raises(OutOfPages, match="2 in chunks pinned or held.*unpinning"):
            a.reserve(12)
        assert a2.state == "committed", "an eviction that does not suffice does not happen"
        late = a.reserve(8)
    assert (a2.state, b0.state, b1.state) == ("evicted", "committed", "evicted")
    assert (a.forgotten.chunks, a.forgotten.tokens) == (2, 8)
    assert list(a.forgotten.last) == [(1.0, 2.0), (2.0, 3.0)] and b.forgotten.chunks == 1
    assert {pinned.state, sink.state, text.state} == {"committed"}
    assert {late.state, pending.state} == {"reserved"}
    pinned.pinned = False
    a.reserve(4)
    assert (pinned.state, b0.state) == ("evicted", "committed")


def test_other_streams_lose_their_oldest_first_whoever_opened_first():
    cache = make_cache(pages=6, page_size=4, on_full="evict_oldest")
    a, b, c = (cache.open() for _ in range(3))
    blocks = [add(stream, 4) for stream in (c, b, c, b, b, c)]
    for gone in range(1, 7):
        a.reserve(4)
        assert [x.state == "evicted" for x in blocks] == [True] * gone + [False] * (6 - gone)


def test_grow_keeps_contents_and_ids():
    cache = make_cache(pages=2, page_size=4, raw_keys=True, grow=True, max_pages=7)
    stream = cache.open()
    a = add(stream, 8)
    for pool, value in ((cache.k_pages, 1.0), (cache.v_pages, 2.0), (cache.raw_k_pages, 3.0)):
        pool.fill_(value)
    b = add(stream, 12, bucket=20)
    assert cache.total_pages == 7, "doubled until it fits, but not beyond max_pages"
    assert fills(cache, a) == [4, 4] and fills(cache, b) == [4, 4, 4]
    assert len(cache.page_fill) == cache.k_pages.shape[1] == cache.v_pages.shape[1] == 7
    for pool, value in ((cache.k_pages, 1.0), (cache.v_pages, 2.0), (cache.raw_k_pages, 3.0)):
        assert (pool[:, a.pages] == value).all()
    with pytest.raises(OutOfPages, match="at most 7 pages.*a larger max_pages"):
        stream.reserve(12)
    assert cache.total_pages == 7


def test_grow_then_evict():
    cache = make_cache(pages=1, page_size=4, grow=True, max_pages=3, on_full="evict_oldest")
    stream = cache.open()
    blocks = [add(stream, 4) for _ in range(5)]
    assert [b.state for b in blocks] == ["evicted"] * 2 + ["committed"] * 3
    assert cache.total_pages == 3


def test_bytes():
    cache = make_cache(layers=3, pages=8, page_size=4, dtype=torch.bfloat16)
    pool = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert cache.pool_bytes == pool and cache.raw_k_pages is None
    stream = cache.open()
    block = stream.reserve(20)
    assert cache.bytes == pool * 5 // 8
    stream.plan(block, 4, 20)
    stream.commit(block, 4)
    assert (cache.bytes, cache.peak_bytes) == (pool // 8, pool * 5 // 8)
    raw = make_cache(layers=3, pages=8, page_size=4, dtype=torch.bfloat16, raw_keys=True)
    assert raw.pool_bytes == pool * 3 // 2


# -- the device ----------------------------------------------------------------------------------


def a_life(device: str) -> None:
    """Every call of a stream's hot path, with the count on the device."""
    cache = make_cache(pages=40, device=device, on_full="evict_oldest")
    stream = cache.open()
    count = torch.full((), 5, dtype=torch.int32, device=device)
    for _ in range(20):
        block = stream.reserve(10, markers=(1, 1))
        stream.set_summary(block, torch.ones(4, device=device))
        slots = stream.plan(block, count, 12)
        assert slots.shape == (12,)
        stream.page_table([*stream.chunks[-3:], block])
        stream.commit(block, 5)
    text = stream.reserve(3, kind="text")
    stream.plan(text, 3, 3)
    stream.commit(text, 3)
    for n in (1, 1, 6, 1):
        stream.append_tokens(text, n)
    stream.evict(stream.chunks[2])
    assert stream.block_pages()[1] == stream.summaries().shape[1] == len(stream.chunks)
    stream.free(text)
    stream.rollback(stream.reserve(9))
    assert stream.forgotten.chunks > 1
    stream.close()


def test_no_call_reads_the_device():
    """A meta tensor has no data: any .item() or data-dependent shape raises."""
    a_life("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_call_waits_for_the_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        a_life("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
