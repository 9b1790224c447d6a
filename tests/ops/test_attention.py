"""sink_window_attention: dtypes, shapes, tables and masks, against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import check, inverse_frequencies, make_case

import vicostream_kernels as vk
from kit.backends import backends_of
from kit.compare import assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import backends

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("head_dim", (8, 24, 64, 80, 96, 128, 256))
def test_head_dims_and_dtypes(backend, dtype, head_dim):
    lists = [[4, 1, 3], [5, 0, -1]]
    check(make_case([3, 1], lists, kv_len=[11, 8], head_dim=head_dim, dtype=dtype), backend)


@each_backend
@pytest.mark.parametrize("page_size", (1, 3, 16, 64, 256))
def test_page_sizes(backend, page_size):
    fill = [min(page_size, n) for n in (page_size, 1, 5, 0)]
    check(make_case([5], [[2, 3, 0, 1]], pages=4, page_size=page_size, page_fill=fill), backend)


@each_backend
@pytest.mark.parametrize(("kv_heads", "group"), ((1, 1), (1, 7), (2, 8), (3, 5), (4, 1)))
def test_head_groups(backend, kv_heads, group):
    check(make_case([4], [[1, 0, 2]], kv_len=[10], kv_heads=kv_heads, group=group), backend)


@each_backend
def test_prefill_of_odd_lengths(backend):
    order = [[7, 2, 9, 0, 5, 3, 1, 8], [4, 6, -1, -1, 11, 10, -1, -1]]
    case = make_case([67, 33], order, page_size=16, kv_len=[123, 50], head_dim=64)
    check(case, backend)
    check(case.changed(window=21, sink_tokens=5), backend)


@each_backend
def test_decode_over_a_long_list(backend):
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order, [page if n % 3 else -1 for n, page in enumerate(order)]]
    fill = [(7 * page) % 17 for page in range(150)]
    check(make_case([1, 2], tables, pages=150, page_size=16, page_fill=fill, group=4), backend)


@each_backend
def test_queries_are_the_whole_sequence(backend):
    check(make_case([14], [[2, 0, 5, 1]], kv_len=[14]), backend)


@each_backend
@pytest.mark.parametrize("scale", (-0.4, 0.0))
@pytest.mark.parametrize("queries", (6, 30))
def test_a_factor_that_is_not_positive(backend, queries, scale):
    check(make_case([queries], [[1, 0, 2]], page_size=16, kv_len=[40], sm_scale=scale), backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_scores_far_beyond_exp(backend, dtype):
    case = make_case([6], [[1, 0, 2]], kv_len=[12], dtype=dtype, sm_scale=50.0)
    _, lse = check(case, backend)
    assert lse.abs().max() > 100.0  # exp overflows float32 at 89


# ---- tables


@each_backend
def test_one_table_a_kv_head(backend):
    tables = [[[3, -1, 1, 4], [-1, 0, 5, 2]], [[1, 1, 1, -1], [7, 6, -1, -1]]]
    fill = [4, 2, 3, 4, 1, 4, 0, 2] + [0] * 4
    check(make_case([3, 2], tables, page_fill=fill, sink_tokens=2, window=3), backend)


@each_backend
def test_one_table_a_query_head(backend):
    tables = [[[3, -1, 1], [-1, 0, 5], [2, 4, 3], [-1, -1, -1]]]
    check(make_case([3], tables, page_fill=[4, 2, 3, 4, 1, 4] + [0] * 6), backend)


@each_backend
def test_equal_lists_a_head_are_the_shared_list(backend):
    shared = make_case([3], [[4, -1, 0, 2]], page_fill=[4, 4, 1, 4, 3] + [0] * 7)
    out, lse = check(shared, backend)
    for copies in (2, 4):
        tables = shared.page_table[:, None].expand(1, copies, 4)
        per_head = shared.changed(page_table=tables)
        got, got_lse = per_head.run(backend)
        torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_lse, lse, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("how", ("kv_len", "page_fill"))
def test_missing_entries_contribute_nothing_wherever_they_stand(backend, how):
    options = {"kv_len": [10]} if how == "kv_len" else {"page_fill": [4, 0, 4, 0, 2] + [0] * 7}
    plain = make_case([3], [[2, 0, 4]], **options)
    out, lse = check(plain, backend)
    for table in ([-1, 2, -1, -1, 0, 4], [2, 0, 4, -1, -1], [2, 99, 0, -7, 4, 12]):
        holed = plain.changed(page_table=torch.tensor([table], dtype=torch.int32))
        got, got_lse = holed.run(backend)
        assert_same_bits(got, out, name=f"out with {table}")
        assert_same_bits(got_lse, lse, name=f"lse with {table}")


@each_backend
def test_pages_beyond_kv_len_are_not_read(backend):
    check(make_case([2], [[2, 0, 4, 5]], kv_len=[5]), backend)


@each_backend
def test_lengths_and_fills_beyond_the_pages_are_what_the_pages_hold(backend):
    full = make_case([2], [[2, 0, 4]], kv_len=[12])
    out, _ = check(full, backend)
    assert_same_bits(
        full.changed(kv_len=torch.tensor([99], dtype=torch.int32)).run(backend)[0], out
    )
    fills = torch.full((12,), 1 << 30, dtype=torch.int32)
    got, lse = full.changed(kv_len=None, page_fill=fills).run(backend)
    assert_same_bits(got, out)
    got, lse = full.changed(kv_len=None, page_fill=-fills).run(backend)
    assert got.eq(0).all() and lse.eq(-math.inf).all()
    got, lse = full.changed(kv_len=torch.tensor([-3], dtype=torch.int32)).run(backend)
    assert got.eq(0).all() and lse.eq(-math.inf).all()


@each_backend
def test_a_page_listed_twice_counts_twice(backend):
    check(make_case([1, 2], [[2, 0, 2], [0, 0, 2]], page_fill=[3, 0, 2] + [0] * 9), backend)


@each_backend
@pytest.mark.parametrize("where", ("unlisted", "unfilled"))
def test_other_slots_have_no_effect(backend, where):
    table, fill = [3, 0, 5], [4, 4, 4, 2, 4, 3] + [4] * 6
    case = make_case([3], [table], page_fill=fill, window=6, sink_tokens=1)
    out, lse = check(case, backend)
    others = torch.ones(12, 4, dtype=torch.bool)
    others[table] = False
    if where == "unfilled":
        others = torch.arange(4) >= torch.tensor(fill)[:, None]
    assert case.k_pages[others].isnan().all()
    for value in (0.0, math.inf, -1e30):
        case.k_pages[others] = value
        case.v_pages[others] = value
        again, lse_again = case.run(backend)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


def test_reference_keeps_unseen_keys_out_whatever_they_hold():
    """Stricter than the contract asks of fast backends: listed, but not seen by this row."""
    case = make_case([4], [[3, 0]], kv_len=[8], sink_tokens=1, window=3)
    backend = ("reference", "cpu")
    wanted, wanted_lse = case.run(backend)
    case.k_pages[0, 3] = math.nan  # the last logical key: only the last row sees it
    case.v_pages[0, 3, 0, 1] = math.nan
    case.v_pages[3, 1] = math.inf  # logical key 1: behind every window
    case.v_pages[3, 0, 0, 2] = -math.inf  # logical key 0: a sink
    out, lse = case.run(backend)
    assert_same_bits(lse[:3], wanted_lse[:3])
    for got in (out, case.run(backend, return_lse=False)[0]):
        assert got[3].isnan().all() and got[:3, :2, 2].eq(-math.inf).all()
        wanted[:3, :2, 2] = -math.inf
        torch.testing.assert_close(got[:3], wanted[:3])


# ---- who sees what: q = 0 gives every visible key the same weight, V one-hot names it


def seen_by_row(backend, queries, keys, **options) -> list[list[int]]:
    """For each query of one stream, the logical keys that it sees."""
    case = make_case([queries], [[1, 0, 2, 3]], kv_len=[keys], head_dim=16, kv_heads=1, **options)
    case.q.zero_()
    one_hot = torch.eye(16).view(4, 4, 1, 16)
    for place, page in enumerate((1, 0, 2, 3)):
        filled = ~case.v_pages[page].isnan().any(-1)
        case.v_pages[page][filled] = one_hot[place][filled]
    out, lse = case.run(backend)
    seen = []
    for row, log_sum in zip(out[:, 0], lse[:, 0]):
        seen.append(row.nonzero().flatten().tolist())
        count = len(seen[-1])
        torch.testing.assert_close(row[seen[-1]], torch.full((count,), 1.0 / max(count, 1)))
        # natural log: n equal scores of 0 sum to ln n
        assert float(log_sum) == pytest.approx(math.log(count) if count else -math.inf, abs=1e-6)
    return seen


@each_backend
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8], [*range(10)]]),
        ({"window": 1}, [[7], [8], [9]]),
        ({"window": 3}, [[5, 6, 7], [6, 7, 8], [7, 8, 9]]),
        ({"window": 8}, [[0, *range(1, 8)], [*range(1, 9)], [*range(2, 10)]]),
        ({"window": 3, "sink_tokens": 2}, [[0, 1, 5, 6, 7], [0, 1, 6, 7, 8], [0, 1, 7, 8, 9]]),
        ({"window": 3, "sink_tokens": 6}, [[*range(8)], [*range(9)], [0, 1, 2, 3, 4, 5, 7, 8, 9]]),
        ({"window": 0, "sink_tokens": 2}, [[0, 1]] * 3),
        ({"window": 0}, [[]] * 3),
        ({"sink_tokens": 9}, [[*range(8)], [*range(9)], [*range(10)]]),
        ({"sink_tokens": 9, "window": 0}, [[*range(8)], [*range(9)], [*range(9)]]),
        ({"window_start": [6]}, [[6, 7], [6, 7, 8], [6, 7, 8, 9]]),
        ({"window_start": [8]}, [[], [8], [8, 9]]),
        ({"window_start": [99], "sink_tokens": 1}, [[0]] * 3),
        ({"window_start": [-5]}, [[*range(8)], [*range(9)], [*range(10)]]),
        ({"window_start": [7], "window": 2}, [[7], [7, 8], [8, 9]]),
        (
            {"window_start": [7], "window": 2, "sink_tokens": 1},
            [[0, 7], [0, 7, 8], [0, 8, 9]],
        ),
        ({"window": 1 << 40}, [[*range(8)], [*range(9)], [*range(10)]]),
    ],
    ids=str,
)
def test_who_sees_what(backend, options, wanted):
    assert seen_by_row(backend, 3, 10, **options) == wanted


@each_backend
def test_more_queries_than_keys(backend):
    """The first queries stand before the sequence and see nothing, sinks included."""
    wanted = [[], [], [0], [0, 1], [0, 1, 2]]
    assert seen_by_row(backend, 5, 3) == wanted
    assert seen_by_row(backend, 5, 3, sink_tokens=3, window=1) == wanted


@each_backend
def test_window_start_is_the_streams_own(backend):
    case = make_case([2, 2, 2], [[1, 0]] * 3, kv_len=[8] * 3, window_start=[0, 4, 7], window=5)
    check(case, backend)


# ---- scale, sink logits, empty things


@each_backend
def test_sink_logits(backend):
    logits = [0.5, -1.0, 8.0, -math.inf]
    case = make_case([3, 1], [[4, 1], [0, -1]], kv_len=[7, 4], sink_logits=logits)
    out, lse = check(case, backend)
    plain, plain_lse = case.changed(sink_logits=None).run(backend)
    torch.testing.assert_close(out[:, 3], plain[:, 3])  # a logit of -inf is none
    expected = torch.logaddexp(plain_lse, torch.tensor(logits))
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, plain * (plain_lse - lse).exp()[..., None])


@each_backend
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_sink_logits_in_the_models_dtype(backend, dtype):
    case = make_case([3], [[4, 1]], kv_len=[7], dtype=dtype, sink_logits=[0.5, -1.0, 2.0, 0.0])
    wanted, _ = check(case, backend)
    narrow = case.changed(sink_logits=case.options["sink_logits"].to(dtype))
    assert_same_bits(narrow.run(backend)[0], wanted)


@each_backend
@pytest.mark.parametrize("options", ({}, {"sink_logits": [1.0, 0.0, -1.0, 2.0]}), ids=str)
def test_rows_that_see_nothing(backend, options):
    tables = [[-1, -1], [3, -1], [-1, 2], [5, -1]]
    case = make_case([2, 0, 3, 2], tables, kv_len=[0, 4, 2, 3], padding=3, **options)
    out, lse = check(case, backend)
    nothing = [0, 1, 2, 7, 8, 9]  # empty stream, before the sequence, padding
    assert out[nothing].eq(0).all() and lse[nothing].eq(-math.inf).all()
    assert lse[[3, 4, 5, 6]].isfinite().all()


@each_backend
def test_nothing_at_all(backend):
    for case in (
        make_case([], torch.zeros(0, 3), padding=2, kv_len=[]),  # no streams
        make_case([2], torch.zeros(1, 0), kv_len=[0]),  # no entries
        make_case([2, 1], [[0], [1]], pages=0, page_fill=[]),  # no pages
        make_case([0, 0], [[1], [2]], kv_len=[4, 4]),  # no queries
    ):
        out, lse = case.run(backend)
        assert out.shape == case.q.shape and lse.shape == case.q.shape[:2]
        assert out.eq(0).all() and lse.eq(-math.inf).all()


@each_backend
def test_launch_hint_never_changes_results(backend):
    case = make_case([5, 1], [[4, 1], [0, -1]], kv_len=[7, 4])
    out, lse = check(case, backend)
    for hint in (0, 1, 5, 1000):
        again, lse_again = case.run(backend, max_seqlen_q=hint)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


@each_backend
def test_out_is_written_in_place(backend):
    case = make_case([3], [[4, 1]], kv_len=[7], padding=1)
    wanted, _ = check(case, backend)
    name, device = backend
    buffer = torch.full((4, 4, 24), math.nan, device=device)
    out = buffer[..., :16]
    tables = [x.to(device) for x in (case.page_table, case.cu_seqlens_q, case.options["kv_len"])]
    q, k, v = (x.to(device) for x in (case.q, case.k_pages, case.v_pages))
    got = vk.sink_window_attention(
        q, k, v, tables[0], tables[1], kv_len=tables[2], out=out, backend=name
    )
    assert got is out
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-6)
    assert buffer[..., 16:].isnan().all()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_streams_bits_do_not_depend_on_the_others(backend, dtype):
    tables = [[7, 2, 9], [0, -1, 5], [3, 1, 8], [4, -1, -1]]
    queries, starts = [17, 1, 5, 3], [0, 17, 18, 23, 26]
    case = make_case(queries, tables, page_size=16, kv_len=[45, 20, 48, 9], dtype=dtype, window=30)
    out, lse = check(case, backend)
    alone, _ = case.run(backend, return_lse=False)
    orders = ([0], [1], [2], [3], [3, 1], [2, 0, 1])
    for order in orders[-2:] if backends.INTERPRET else orders:  # each stream is in these two
        rows = [row for s in order for row in range(starts[s], starts[s + 1])]
        counts = [0, *(queries[s] for s in order)]
        fewer = case.changed(
            q=case.q[rows],
            page_table=case.page_table[order],
            cu_seqlens_q=torch.tensor(counts).cumsum(0).int(),
            kv_len=case.options["kv_len"][order],
        )
        got, got_lse = fewer.run(backend)
        assert_same_bits(got, out[rows], name=f"out of streams {order}")
        assert_same_bits(got_lse, lse[rows], name=f"lse of streams {order}")
        got, _ = fewer.run(backend, return_lse=False)
        assert_same_bits(got, alone[rows], name=f"out without lse of streams {order}")


# ---- the op as torch sees it


def test_opcheck_and_fullgraph():
    case = make_case(
        [3, 0, 2],
        [[4, 1], [3, -1], [0, 2]],
        page_fill=[4, 2, 3, 4, 1] + [0] * 7,
        padding=2,
        window_start=[0, 0, 3],
        sink_logits=[0.5, 1.0, -2.0, 0.0],
        page_shift=[[[3, 1, 2]] * 2] * 3,
        inv_freq=inverse_frequencies(16),
    )
    opt = case.options
    pools = [x.nan_to_num(0.0) for x in (case.k_pages, case.v_pages)]
    buffers = torch.zeros(case.q.shape), torch.zeros(case.q.shape[:2])
    args = (case.q, *pools, case.page_table, case.cu_seqlens_q, *buffers, None, opt["page_fill"])
    rest = (2, 3, opt["window_start"], 0.25, opt["sink_logits"], opt["page_shift"])
    args += (*rest, opt["inv_freq"], [4, 2, 2], 3)
    op = torch.ops.vicostream.sink_window_attention.default
    check_op(op, args)
    check_fullgraph(torch.ops.vicostream.sink_window_attention, *args)
    check_refuses_grad(op, args)
    least = (case.q, *pools, case.page_table, case.cu_seqlens_q, buffers[0])
    check_op(op, least, {"page_fill": opt["page_fill"]})


def test_fullgraph_of_the_public_function():
    case = make_case([3], [[4, 1]], kv_len=[7])

    def call(q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len):
        return vk.sink_window_attention(
            q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len=kv_len, return_lse=True
        )

    tables = (case.page_table, case.cu_seqlens_q, case.options["kv_len"])
    check_fullgraph(call, case.q, case.k_pages, case.v_pages, *tables)
