"""select_pages: every page once, in logical order; and what attention then reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.ops import check_fullgraph, check_op
from vicostream_kernels import backends

BACKENDS = backends_of("select_pages")


def table_by_hand(index, pages, sinks, recent):
    """Sinks, then blocks, then recent pages; a page stays with sinks, else recent, else a block."""

    def once(listed, taken):
        made = []
        for page in listed:
            if page >= 0 and page not in taken and page not in made:
                made.append(page)
        return made

    first = once(sinks, [])
    end = once(recent, first)
    blocks = [page for b in index if 0 <= b < len(pages) for page in pages[b]]
    return first + once(blocks, first + end) + end


@st.composite
def cases(draw):
    streams, rows = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 3]))
    blocks, width, chosen = (draw(st.integers(0, 4)) for _ in range(3))
    page = st.integers(-1, 12)

    def listed(n):
        return st.lists(page, min_size=n, max_size=n)

    def maybe():
        n = draw(st.none() | st.integers(0, 4))
        return None if n is None else [draw(listed(n)) for _ in range(streams)]

    index = st.lists(st.integers(-1, 5), min_size=chosen, max_size=chosen)
    return {
        "index": [[draw(index) for _ in range(rows or 1)] for _ in range(streams)],
        "per_head": rows is not None,
        "pages": [[draw(listed(width)) for _ in range(blocks)] for _ in range(streams)],
        "sinks": maybe(),
        "recent": maybe(),
        "shape": (streams, rows or 1, blocks, width, chosen),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15 if backends.INTERPRET else 300, deadline=None)
@given(case=cases())
def test_lists_each_page_once_in_order(backend, case):
    name, device = backend
    streams, rows, blocks, width, chosen = case["shape"]

    def tensor(x, *shape):
        return torch.tensor(x, dtype=torch.int32, device=device).view(shape)

    index = tensor(case["index"], streams, rows, chosen)
    extra = {
        f"{key}_pages": None if case[key] is None else tensor(case[key], streams, len(case[key][0]))
        for key in ("sinks", "recent")
    }
    got = vico.select_pages(
        index if case["per_head"] else index[:, 0], tensor(case["pages"], streams, blocks, width),
        extra["sinks_pages"], extra["recent_pages"], backend=name,
    )  # fmt: skip
    length = chosen * width + sum(len(case[k][0]) for k in ("sinks", "recent") if case[k])
    assert got.dtype == torch.int32
    assert got.shape == ((streams, rows, length) if case["per_head"] else (streams, length))
    for s in range(streams):
        for r in range(rows):
            sinks, recent = (case[k][s] if case[k] else [] for k in ("sinks", "recent"))
            wanted = table_by_hand(case["index"][s][r], case["pages"][s], sinks, recent)
            row = (got[s, r] if case["per_head"] else got[s]).tolist()
            assert row == wanted + [-1] * (length - len(wanted))
            assert len(set(wanted)) == len(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chosen_block_of_the_recent_window_stays_in_time_order(backend):
    name, device = backend
    pages = torch.tensor([[[1, 2], [3, -1], [4, 5], [6, 7]]], dtype=torch.int32, device=device)
    index = torch.tensor([[0, 3, -1]], dtype=torch.int32, device=device)
    recent = torch.tensor([[4, 5, 6, 7, 8]], dtype=torch.int32, device=device)
    sinks = torch.tensor([[0, -1]], dtype=torch.int32, device=device)
    got = vico.select_pages(index, pages, sinks, recent, backend=name)
    assert got.tolist() == [[0, 1, 2, 4, 5, 6, 7, 8, -1, -1, -1, -1, -1]]


def test_out_of_range_blocks_are_skipped_and_large_page_ids_survive():
    pages = torch.tensor([[[2**31 - 1, 2**31 - 2], [0, 5]]], dtype=torch.int32)
    index = torch.tensor([[0, 7, -3, 1]], dtype=torch.int32)
    got = vico.select_pages(index, pages)
    assert got.tolist() == [[2**31 - 1, 2**31 - 2, 0, 5, -1, -1, -1, -1]]


@pytest.mark.parametrize("scope,rows", [("stream", None), ("kv_head", 2), ("query_head", 4)])
def test_attention_reads_what_was_chosen(scope, rows):
    """From keys to output: summarise, choose, list, attend; against a softmax over those keys."""
    page_size, heads, groups, d = 4, 4, 2, 16
    k_pages, v_pages = (tensors.randn((9, page_size, groups, d), seed=i) for i in (1, 2))
    fill = torch.tensor([4, 3, 4, 2, 4, 1, 4, 3, 1], dtype=torch.int32)
    table = torch.tensor([[[1, -1], [2, 3], [4, -1], [5, -1], [6, 7]]], dtype=torch.int32)
    question = tensors.randn((1, heads, d), seed=3)
    means = vico.summarize_blocks(k_pages, table, fill)
    chosen = vico.topk_blocks(question, means, k=2, scope=scope).block_index
    page_table = vico.select_pages(
        chosen,
        table,
        torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([[8]], dtype=torch.int32),
    )
    got = vico.sink_window_attention(
        question, k_pages, v_pages, page_table, torch.tensor([0, 1], dtype=torch.int32),
        page_fill=fill,
    )  # fmt: skip
    for h in range(heads):
        row = {"stream": 0, "kv_head": h // 2, "query_head": h}[scope]
        blocks = chosen.reshape(1, rows or 1, 2)[0, row].tolist()
        pages = [0, *(p for b in blocks for p in table[0, b].tolist() if p >= 0), 8]
        keys = torch.cat([k_pages[p, : fill[p], h // 2] for p in pages]).double()
        values = torch.cat([v_pages[p, : fill[p], h // 2] for p in pages]).double()
        weights = (keys @ question[0, h].double() / d**0.5).softmax(0)
        torch.testing.assert_close(got[0, h].double(), weights @ values, rtol=0, atol=2e-6)


def test_registration_and_fullgraph():
    index = tensors.ints((2, 3, 4), -1, 5)
    pages = tensors.ints((2, 5, 3), -1, 20, seed=1)
    recent = tensors.ints((2, 2), -1, 20, seed=2)
    op = torch.ops.vicostream.select_pages.default
    check_op(op, (index, pages, None, recent))
    check_op(op, (index[:, 0], pages))
    check_fullgraph(vico.select_pages, index, pages, recent, recent + 1)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"block_index": torch.zeros(2, 3)}, TypeError, "block_index has dtype float32"),
        ({"block_index": torch.zeros(3).int()}, ValueError, "block_index must have 3 dim"),
        ({"block_index": torch.zeros(1, 3).int()}, ValueError, "block_index has shape .*S=2"),
        ({"block_pages": torch.zeros(2, 3).int()}, ValueError, "block_pages must have 3 dim"),
        ({"sink_pages": torch.zeros(2).int()}, ValueError, "sink_pages must have 2 dim"),
        ({"recent_pages": [[1], [2]]}, TypeError, "recent_pages must be a tensor or None"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
    ],
)
def test_bad_input_is_named(change, error, match):
    given = {
        "block_index": torch.zeros(2, 3).int(), "block_pages": torch.zeros(2, 4, 2).int(), **change,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        vico.select_pages(**given)
