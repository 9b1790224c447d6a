"""Summaries that a stream keeps of its keys, against summaries made afterwards from its pages."""

from __future__ import annotations

import random

import pytest
import torch
from cache_kit import make_cache

from vicostream_kernels import rope_append, summarize_blocks

LAYERS, GROUPS, DIM, SIZE = 2, 2, 8, 4


def open_stream(kind="mean", unit="chunk", sub=1, source="rotated", pages=8):
    cache = make_cache(
        layers=LAYERS, pages=pages, page_size=SIZE, kv_heads=GROUPS, head_dim=DIM, grow=True
    )
    stream = cache.open()
    stream.keep_keys(kind=kind, unit=unit, sub=sub, source=source)
    return stream


def write(stream, block, count, rng):
    """What a forward does: one rope_append a layer, on the slots of a plan."""
    cache, keys = stream.cache, stream.keys
    rows = block.bucket + sum(block.markers)
    slots = stream.plan(block, count, rows)
    noise = torch.Generator().manual_seed(rng.randrange(10**6))
    positions = torch.randint(0, 99, (3, rows), generator=noise, dtype=torch.int32)
    for layer in range(LAYERS):
        q, k, v = (torch.randn(rows, GROUPS, DIM, generator=noise) for _ in range(3))
        rope_append(
            q, k, v, positions, torch.rand(DIM // 2, generator=noise), None,
            cache.k_pages[layer], cache.v_pages[layer], slots,
            summary=keys.of_layer(layer), block_of_page=keys.block_of_page,
        )  # fmt: skip


def add(stream, count, rng, bucket=None, markers=(1, 1)):
    block = stream.reserve(count if bucket is None else bucket, markers=markers)
    write(stream, block, count, rng)
    stream.commit(block, count)
    return block


def check(stream):
    """Rows, pages and summaries are those of the live chunks, whatever happened before."""
    keys, cache, chunks = stream.keys, stream.cache, list(stream.chunks)
    unit = keys.unit == "page"
    wanted = [
        (block, pages)
        for block in chunks
        for pages in ([[p] for p in block.body.pages] if unit else [block.body.pages])
        if pages
    ]
    rows = keys.rows(chunks)
    assert rows == [block for block, _ in wanted]
    listed = [[p for p in row if p >= 0] for row in keys.table(len(rows))[0].tolist()]
    assert listed == [pages for _, pages in wanted]
    owned = {page for _, pages in wanted for page in pages}
    owner = keys.block_of_page.tolist()
    assert {page for page, row in enumerate(owner) if row >= 0} == owned
    for layer in range(LAYERS if rows else 0):
        expected = summarize_blocks(
            cache.k_pages[layer], keys.table(len(rows)), cache.page_fill, keys.kind, keys.sub
        )
        got = keys.summaries(len(rows))[layer]
        if keys.kind == "mean":
            assert torch.equal(got.sum / got.count[:, None, None], expected[0])
        else:
            assert torch.equal(got.kmin, expected[0][0]) and torch.equal(got.kmax, expected[1][0])


@pytest.mark.parametrize(
    ("kind", "unit", "sub"),
    [("mean", "chunk", 1), ("mean", "page", 1), ("minmax", "page", 4), ("minmax", "chunk", 2)],
)
def test_rows_follow_their_chunks(kind, unit, sub):
    """Commits that leave pages over, empty chunks, rollbacks and evictions anywhere."""
    rng = random.Random(f"{kind}{unit}{sub}")
    stream = open_stream(kind, unit, sub)
    for turn in range(50):
        what = rng.random()
        if what < 0.55 or not stream.chunks:
            count = rng.randrange(0, 14)
            add(stream, count, rng, bucket=count + rng.randrange(0, 9))
        elif what < 0.7:
            block = stream.reserve(rng.randrange(1, 12), markers=(1, 1))
            if rng.random() < 0.7:
                write(stream, block, rng.randrange(0, block.bucket + 1), rng)
            stream.rollback(block)
        elif what < 0.9:
            stream.evict(rng.choice(stream.chunks[:]))
        else:
            stream.evict(stream.chunks[0])
        if turn % 5 == 0:
            check(stream)
    check(stream)


def test_a_chunk_in_flight_keeps_its_rows_when_the_table_moves():
    """Another chunk goes, and a question compacts the table, between reservation and commit."""
    rng, stream = random.Random(3), open_stream()
    blocks = [add(stream, 6, rng) for _ in range(4)]
    block = stream.reserve(9, markers=(1, 1))
    stream.evict(blocks[1])
    assert stream.keys.rows(stream.chunks[:]) == [blocks[0], *blocks[2:]]
    write(stream, block, 9, rng)
    stream.commit(block, 9)
    check(stream)


@pytest.mark.parametrize(("kind", "unit"), [("mean", "chunk"), ("minmax", "page")])
def test_what_a_question_reads_stays_as_it_was(kind, unit):
    """The oldest chunk goes, then the table is rebuilt, while the answer still chooses."""
    rng, stream = random.Random(4), open_stream(kind, unit)
    blocks = [add(stream, 6, rng) for _ in range(4)]
    rows, name = stream.keys.rows(blocks), "sum" if kind == "mean" else "kmin"
    before = [stream.keys.rows_of(block)[name].clone() for block in blocks]
    summaries = stream.keys.summaries(len(rows))
    stream.evict(blocks[0])
    for moved in (False, True):
        if moved:
            table = stream.keys.pages
            assert stream.keys.rows(blocks[1:]) == rows[rows.count(blocks[0]) :]
            while stream.keys.pages is table:
                add(stream, 6, rng)
        for layer, summary in enumerate(summaries):
            wanted = torch.cat([tensor[layer] for tensor in before])
            assert torch.equal(getattr(summary, name), wanted), (moved, layer)


def test_raw_keys_are_those_before_rotation():
    """At position 0 nothing turns; elsewhere the raw mean is not that of the cached keys."""
    stream = open_stream(source="raw")
    cache, keys = stream.cache, stream.keys
    block = stream.reserve(5)
    slots = stream.plan(block, 5, 5)
    k = torch.randn(5, GROUPS, DIM)
    where = torch.full((3, 5), 7, dtype=torch.int32)
    rope_append(
        k, k, k, where, torch.ones(DIM // 2), None, cache.k_pages[0], cache.v_pages[0], slots,
        summary=keys.of_layer(0), block_of_page=keys.block_of_page,
    )  # fmt: skip
    stream.commit(block, 5)
    got = keys.summaries(1)[0]
    torch.testing.assert_close(got.sum[0] / 5, k.mean(0))
    assert not torch.allclose(got.sum[0], cache.k_pages[0].flatten(0, 1)[slots.long()].sum(0))


def test_the_table_is_bounded_by_what_lives():
    """A stream that forgets as fast as it sees keeps its bytes; they are on the cache's account."""
    rng, stream = random.Random(5), open_stream(unit="page")
    sizes = []
    for _ in range(90):
        add(stream, 8, rng)
        if len(stream.chunks) > 8:
            stream.evict(stream.chunks[0])
        sizes.append(stream.cache.summary_bytes)
    assert len(set(sizes[40:])) == 1 and sizes[-1] == stream.keys.bytes
    floats = LAYERS * len(stream.keys.pages) * (GROUPS * DIM + 1) * 4  # sums and a count
    assert floats <= sizes[-1] <= 1.2 * floats
    check(stream)


def test_what_is_refused():
    stream = open_stream()
    with pytest.raises(ValueError, match="keep_keys: call it once"):
        stream.keep_keys()
    late = make_cache().open()
    late.reserve(4)
    with pytest.raises(ValueError, match="before the first chunk"):
        late.keep_keys()
    for options, said in (
        ({"kind": "median"}, "kind='median'"),
        ({"unit": "frame"}, "unit='frame'"),
        ({"source": "values"}, "source='values'"),
        ({"sub": 2}, "sub=2"),
        ({"kind": "minmax", "sub": 5}, "sub=5"),
    ):
        with pytest.raises(ValueError, match=said):
            make_cache().open().keep_keys(**options)
