"""Misuse of the cache: the named errors, raised before anything changes."""

from __future__ import annotations

import pytest
import torch
from cache_kit import add, make_cache

from vicostream_kernels import _stream_life
from vicostream_kernels._pages import PagePool
from vicostream_kernels._summaries import KeyRows
from vicostream_kernels.cache import (
    CacheClosed,
    DoubleFree,
    ForeignStream,
    OutOfPages,
    PagedKVCache,
    StaleBlock,
)

USES = {
    "plan": lambda s, b: s.plan(b, 1, 4),
    "commit": lambda s, b: s.commit(b, 1),
    "append_tokens": lambda s, b: s.append_tokens(b, 1),
    "page_table": lambda s, b: s.page_table([b]),
    "set_summary": lambda s, b: s.set_summary(b, torch.ones(2)),
    "hold": lambda s, b: s.hold([b]).__enter__(),
    "evict": lambda s, b: s.evict(b),
    "free": lambda s, b: s.free(b),
    "rollback": lambda s, b: s.rollback(b),
}
WITHOUT_BLOCK = {
    "reserve": lambda s: s.reserve(4),
    "block_pages": lambda s: s.block_pages(),
    "summaries": lambda s: s.summaries(),
    "with": lambda s: s.__enter__(),
}


def state(cache: PagedKVCache) -> tuple:
    """Everything a failed call must leave as it was."""
    blocks = [(str(b), b.pages, b.row) for s in cache.streams for b in [*s.blocks, *s._reserved]]
    tokens = [(s.tokens, s.forgotten.chunks) for s in cache.streams]
    return blocks, tokens, cache.free_pages, cache.page_fill.tolist()


@pytest.fixture
def cache() -> PagedKVCache:
    return make_cache(pages=20)


@pytest.mark.parametrize(
    "wrong", [dict(bucket=-5), dict(bucket=2.5), dict(markers=(-9, 1)), dict(spare=-100)]
)
def test_room_for_what_no_block_can_be_is_refused(cache, wrong):
    stream = cache.open()
    before = state(cache)
    with pytest.raises((ValueError, TypeError)):
        stream.make_room(**{"bucket": 4, **wrong})
    assert state(cache) == before


def test_room_is_made_but_for_what_is_given_back(cache):
    stream = cache.open()
    kept = add(stream, 4)
    pages = cache.free_pages
    with pytest.raises(OutOfPages):
        stream.make_room(4 * pages + 4)
    stream.make_room(4 * pages + 4, spare=len(kept.pages))
    assert cache.free_pages == pages


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("where", ["stream", "cache"])
def test_a_foreign_block_is_refused(cache, use, where):
    owner = cache.open() if where == "stream" else make_cache().open()
    stream = cache.open()
    for block in (add(owner, 4), add(owner, 4, kind="text"), owner.reserve(4)):
        before = state(cache), state(owner.cache)
        with pytest.raises(ForeignStream, match=f"{use}: .* belongs to another {where}"):
            USES[use](stream, block)
        assert (state(cache), state(owner.cache)) == before


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("gone", ["evict", "free", "rollback"])
def test_a_block_that_is_gone_is_refused(cache, use, gone):
    stream = cache.open()
    add(stream, 4)
    block = stream.reserve(4) if gone == "rollback" else add(stream, 4)
    USES[gone](stream, block)
    before = state(cache)
    error = DoubleFree if use in ("evict", "free", "rollback") else StaleBlock
    with pytest.raises(error, match=f"{use}: chunk block .* was given back before"):
        USES[use](stream, block)
    assert state(cache) == before


def test_a_block_that_the_policy_evicted_is_gone():
    cache = make_cache(pages=1, on_full="evict_oldest")
    stream = cache.open()
    first = add(stream, 4)
    add(stream, 4)
    with pytest.raises(DoubleFree, match="evicted"):
        stream.evict(first)
    assert stream.forgotten.chunks == 1


@pytest.mark.parametrize("use", [*USES, *WITHOUT_BLOCK])
@pytest.mark.parametrize("closed", ["stream", "cache"])
def test_use_after_close(cache, use, closed):
    stream = cache.open()
    block = add(stream, 4)
    (stream if closed == "stream" else cache).close()
    with pytest.raises(CacheClosed, match=f"the {closed} was closed"):
        USES[use](stream, block) if use in USES else WITHOUT_BLOCK[use](stream)
    assert (block.state, block.pages, stream.tokens, stream.blocks) == ("closed", [], 0, [])


@pytest.mark.parametrize(
    "use", ["k_pages", "v_pages", "raw_k_pages", "page_fill", "open", "__enter__"]
)
def test_a_closed_cache_lends_nothing(cache, use):
    with cache, cache.open() as stream:
        add(stream, 4)
    stream.close(), cache.close()  # again: nothing happens
    with pytest.raises(CacheClosed, match="the cache was closed"):
        got = getattr(cache, use)
        got()
    assert (cache.bytes, cache.pool_bytes, cache.streams) == (0, 0, [])
    assert cache.peak_bytes == cache.bytes_per_page


def test_a_closed_stream_leaves_the_others(cache):
    other = cache.open()
    kept = add(other, 6)
    with cache.open() as stream:
        add(stream, 4, kind="sink"), add(stream, 4, pinned=True), stream.reserve(9)
        assert cache.streams == [other, stream]
    assert (cache.used_pages, cache.streams) == (2, [other])
    assert other.page_table([kept]).tolist() == [kept.pages]
    assert cache.page_fill.sum() == 6


@pytest.mark.parametrize(
    "use, kind, committed",
    [
        ("plan", "chunk", True),
        ("commit", "chunk", True),
        ("rollback", "chunk", True),
        ("evict", "chunk", False),
        ("free", "chunk", False),
        ("hold", "chunk", False),
        ("append_tokens", "text", False),
        ("append_tokens", "chunk", True),
        ("append_tokens", "sink", True),
        ("evict", "text", True),
        ("evict", "sink", True),
        ("set_summary", "text", True),
    ],
)
def test_a_call_in_the_wrong_state_or_on_the_wrong_kind(cache, use, kind, committed):
    stream = cache.open()
    block = add(stream, 3, kind=kind) if committed else stream.reserve(3, kind=kind)
    before = state(cache)
    with pytest.raises(ValueError, match=f"{use}: block must be") as caught:
        USES[use](stream, block)
    assert type(caught.value) is ValueError and state(cache) == before


def test_text_with_trailing_markers_cannot_grow(cache):
    stream = cache.open()
    block = add(stream, 3, kind="text", markers=(1, 1))
    with pytest.raises(ValueError, match="without trailing markers"):
        stream.append_tokens(block)
    assert block.tokens == 5


def test_pinned_and_held_blocks_stay(cache):
    stream = cache.open()
    pinned, held = add(stream, 4, pinned=True), add(stream, 4)
    with pytest.raises(ValueError, match="pinned; unpin it first"):
        stream.evict(pinned)
    with stream.hold([pinned, held]), stream.hold([held]):
        with pytest.raises(ValueError, match=r"evict: .* is held by 2 user"):
            stream.evict(held)
        with pytest.raises(ValueError, match=r"free: .* is held by 1 user"):
            stream.free(pinned)
    with pytest.raises(RuntimeError, match="inside"), stream.hold([held]):
        raise RuntimeError("inside")
    stream.evict(held)
    pinned.pinned = False
    stream.evict(pinned)
    assert cache.used_pages == 0


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        ({"bucket": -1}, ValueError, "bucket=-1"),
        ({"bucket": 4.0}, TypeError, "bucket"),
        ({"bucket": True}, TypeError, "bucket"),
        ({"bucket": 0}, ValueError, "reserves nothing"),
        ({"kind": "video"}, ValueError, "kind='video'.*'chunk'"),
        ({"markers": (1,)}, ValueError, "markers"),
        ({"markers": 1}, ValueError, "markers"),
        ({"markers": (1, -1)}, ValueError, r"markers \(trailing\)=-1"),
        ({"start_s": 2.0, "end_s": 1.0}, ValueError, "start_s=2.0, end_s=1.0"),
        ({"end_s": float("nan")}, ValueError, "end_s=nan"),
    ],
)
def test_reserve_checks_its_arguments(cache, arguments, error, named):
    stream = cache.open()
    with pytest.raises(error, match=named):
        stream.reserve(**{"bucket": 4, **arguments})
    assert cache.used_pages == 0


@pytest.mark.parametrize(
    "count, rows, error, named",
    [
        (5, 8, ValueError, "count=5 must be from 0 to 4"),
        (-1, 8, ValueError, "count=-1"),
        (4, 5, ValueError, "count=4 must be from 0 to 3"),
        (0, 1, ValueError, "rows=1 must be >= 2"),
        (1.0, 8, TypeError, "count"),
        (torch.tensor(1.0), 8, TypeError, "count"),
        (torch.tensor([1, 2]), 8, ValueError, "count must be one element"),
        (torch.tensor(1, device="meta"), 8, ValueError, "count must be one element on cpu"),
    ],
)
def test_plan_checks_its_arguments(cache, count, rows, error, named):
    stream = cache.open()
    block = stream.reserve(4, markers=(1, 1))
    with pytest.raises(error, match=named):
        stream.plan(block, count, rows)
    assert not cache.page_fill.any()
    with pytest.raises(ValueError, match="planned first"):
        stream.commit(block, 1)


@pytest.mark.parametrize("call", ["commit", "append_tokens"])
@pytest.mark.parametrize("n, error", [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_counts_are_checked(cache, call, n, error):
    stream = cache.open()
    block = add(stream, 4, kind="text") if call == "append_tokens" else stream.reserve(4)
    if call == "commit":
        stream.plan(block, torch.tensor(1), 4)
    before = state(cache)
    with pytest.raises(error, match=f"{call}: (count|n)"):
        getattr(stream, call)(block, n)
    assert state(cache) == before


def test_only_blocks_are_blocks(cache):
    with pytest.raises(TypeError, match="page_table: block must be a Block, got int"):
        cache.open().page_table([3])


@pytest.mark.parametrize(
    "arguments, error, named",
    [
        ({"pages": 0}, ValueError, "pages=0"),
        ({"layers": 1.5}, TypeError, "layers"),
        ({"pages": 2**29, "page_size": 16}, ValueError, "pages=536870912 must be from 1 to"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype"),
        ({"on_full": "evict"}, ValueError, "on_full='evict'"),
        ({"max_pages": 99}, ValueError, "max_pages=99 needs grow=True"),
        ({"max_pages": 3, "grow": True}, ValueError, "max_pages=3"),
    ],
)
def test_the_cache_checks_its_arguments(arguments, error, named):
    with pytest.raises(error, match=named):
        make_cache(**arguments)


def test_a_failed_growth_leaves_the_cache_as_it_was(monkeypatch):
    cache = make_cache(pages=4, grow=True)
    stream = cache.open()
    block = add(stream, 8)
    before, keys, calls = state(cache), cache.k_pages, []

    def new_pool(pages):
        calls.append(pages)
        if len(calls) == 2:
            raise MemoryError
        return torch.zeros(1, pages, 4, 1, 8)

    monkeypatch.setattr(cache, "_new_pool", new_pool)
    with pytest.raises(MemoryError):
        stream.reserve(12)
    assert state(cache) == before and cache.k_pages is keys and cache.total_pages == 4
    assert stream.page_table([block]).tolist() == [block.pages]


@pytest.mark.parametrize("on_full", ["evict_oldest", "error"])
def test_a_device_without_memory_for_larger_pools_keeps_what_it_has(monkeypatch, on_full):
    """16 pages become 20 where 32 do not fit; then there is no memory for more."""
    cache = make_cache(grow=True, on_full=on_full)
    stream = cache.open()
    new_pool, asked = cache._new_pool, []

    def with_little_memory(pages):
        asked.append(pages)
        if pages > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_pool(pages)

    monkeypatch.setattr(cache, "_new_pool", with_little_memory)
    first, *_ = [add(stream, 16) for _ in range(5)]
    assert cache.total_pages == 20 and asked == [32, 20, 20]
    if on_full == "error":
        before = state(cache)
        with pytest.raises(OutOfPages, match="more memory: there was none for more than 20 pages"):
            add(stream, 16)
        assert state(cache) == before
    else:
        add(stream, 16)
        assert first.state == "evicted" and cache.total_pages == 20
    tries = len(asked)
    with pytest.raises(OutOfPages, match="there was none for more than 20 pages"):
        stream.reserve(100)
    assert len(asked) == tries


@pytest.mark.parametrize("where", ["to_device", "keys", "rows"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_reservation_that_fails_half_way_keeps_no_page(monkeypatch, where, error):
    def fail(*_):
        raise error("simulated")

    cache = make_cache(pages=2 if where == "rows" else 20, grow=True, max_pages=20)
    stream = cache.open()
    stream.keep_keys()
    text = add(stream, 4, kind="text")
    before = state(cache)
    with monkeypatch.context() as patch:
        if where == "keys":
            patch.setattr(KeyRows, "_set_pages", fail)
        elif where == "rows":  # the pool grows, what notes the row of each page cannot
            patch.setattr(KeyRows, "block_of_page", property(fail))
        else:
            patch.setattr(_stream_life, "to_device", fail)
        with pytest.raises(error):
            stream.reserve(6)
        if where == "to_device":
            with pytest.raises(error):
                stream.append_tokens(text)
    if where != "rows":
        assert state(cache) == before
    assert cache.used_pages == 1
    stream.append_tokens(text)
    add(stream, 6)
    stream.close()
    assert cache.used_pages == 0


def test_what_an_interrupt_left_without_a_list_goes_with_its_stream(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    cache = make_cache()
    stream, other = cache.open(), cache.open()
    block, kept = add(stream, 9), add(other, 5)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_clear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream.evict(block)
    assert stream.blocks == [] and cache.used_pages == 5
    stream.close()
    assert cache.used_pages == len(kept.pages) == 2


# -- the allocator itself ------------------------------------------------------------------------


def test_pool_checks_all_pages_before_it_takes_any_back():
    pool = PagePool(5)
    a, b = pool.take(2, "a"), pool.take(1, "b")
    for pages, error in (
        ([a[0], a[0]], DoubleFree),
        ([a[0], 4], DoubleFree),
        ([a[0], b[0]], ForeignStream),
    ):
        with pytest.raises(error):
            pool.give(pages, "a")
        assert (pool.free, pool.used, pool.owner(a[0])) == (2, 3, "a")
    pool.give(a, "a")
    assert pool.owner(a[0]) is None and pool.take(2, "c") == a
    with pytest.raises(OutOfPages, match="3 pages asked, 2 of 5 are free"):
        pool.take(3, "c")
    pool.extend(1)
    assert pool.take(0, "d") == [] and pool.take(3, "d") == [3, 4, 5], "new pages go out last"
    pool.give([3, 4, 5], "d")
    pool.take(1, "e")
    assert (pool.used, pool.peak) == (4, 6)
