"""The ring's arithmetic against a plain list of what each stream has kept."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicostream_kernels.integrations._ring import SinkWindowRing


@st.composite
def streams(draw):
    window = draw(st.integers(1, 13))
    count = draw(st.integers(1, 3))
    calls = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    masks = [
        None
        if draw(st.booleans())
        else torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n),
                          min_size=count, max_size=count))
        )
        for n in calls
    ]  # fmt: skip
    ring = SinkWindowRing(
        count,
        sink_tokens=draw(st.integers(0, 6)),
        window=window,
        page_size=draw(st.integers(1, 6)),
        chunk_tokens=draw(st.integers(1, window)),
        device=torch.device("cpu"),
    )
    return ring, calls, masks


def check_piece(ring, piece, pages, n, tokens, chunk) -> None:
    """Writes the piece's tokens into ``pages``; then its lists must show what is to be seen."""
    flat = [token for row in tokens for token in row]
    columns = range(n)[piece.columns]
    order = (
        [s * n + c for s in range(ring.streams) for c in columns]
        if piece.rows is None
        else piece.rows.tolist()
    )
    for row, slot in zip(order, piece.slots.tolist(), strict=True):
        if slot >= 0:
            page, offset = divmod(slot, ring.page_size)
            pages[page][offset] = flat[row]
    starts = piece.cu_seqlens_q.tolist()
    for s, (history, new) in enumerate(chunk):
        listed = [p for p in piece.page_table[s].tolist() if p >= 0]
        fill = piece.page_fill.tolist()
        logical = [pages[p][o] for p in listed for o in range(fill[p])]
        end, sinks = len(history), ring.sink_tokens
        start = max(end - ring.window, min(sinks, end))
        seen = [t for j, t in enumerate(logical) if j < sinks or j >= int(piece.window_start[s])]
        assert seen == history[:sinks] + history[start:]
        assert all(p // ring.pages_per_stream == s for p in listed)
        queries = [flat[row] for row in order[starts[s] : starts[s + 1]]]
        if n > 1:
            assert queries == new
            assert logical[len(logical) - len(new) :] == new
        if piece.page_shift is not None:
            oldest = start - sinks if end > sinks + ring.window else 0
            expected = torch.zeros_like(piece.page_shift[s])
            expected[: ring.sink_pages] = 3 * oldest * torch.tensor([1, 2, 5])
            assert torch.equal(piece.page_shift[s], expected)
        else:
            assert sinks == 0 or end <= sinks + ring.window


@settings(max_examples=150, deadline=None)
@given(streams())
def test_each_stream_shows_its_sinks_and_its_window(case) -> None:
    ring, calls, masks = case
    pages = [[None] * ring.page_size for _ in range(ring.pages)]
    histories: list[list[int]] = [[] for _ in range(ring.streams)]
    name = 0
    for n, mask in zip(calls, masks, strict=True):
        tokens = torch.arange(name, name + ring.streams * n).view(ring.streams, n).tolist()
        name += ring.streams * n
        real = [
            [t for c, t in enumerate(row) if mask is None or mask[s, c]]
            for s, row in enumerate(tokens)
        ]
        # Token i of a stream has the ids (3, 6, 15) * i: shifts count ids, not tokens.
        counts = [len(h) for h in histories]
        rank = torch.arange(n).expand(ring.streams, n) if mask is None else mask.cumsum(1) - 1
        place = torch.tensor(counts)[:, None] + rank
        ids = 3 * place * torch.tensor([1, 2, 5])[:, None, None]
        size = ring.chunk_tokens
        for i, piece in enumerate(ring.advance(n, mask, ids)):
            chunk = []
            for s, history in enumerate(histories):
                new = real[s][i * size : (i + 1) * size]
                history.extend(new)
                chunk.append((history, new))
            check_piece(ring, piece, pages, n, tokens, chunk)
        assert ring.tokens.tolist() == [len(h) for h in histories]


def test_it_never_needs_more_pages() -> None:
    ring = SinkWindowRing(
        2, sink_tokens=5, window=33, page_size=16, chunk_tokens=8, device=torch.device("cpu")
    )
    assert (ring.sink_pages, ring.ring_pages, ring.pages) == (1, 3, 8)
    for _ in range(200):
        (piece,) = ring.advance(7, None, None)
        assert piece.page_table.shape == (2, 4) and piece.page_fill.shape == (8,)
        assert piece.slots.max() < 8 * 16
