"""attention: the streams with few query rows, their keys split over programs, and one combination.

What bounds it: memory. The rows of a KV head (7 to 16 of one query, usually) read each of its keys
once, 4 d bytes for 4 d operations a row, so a stream's keys are cut into runs that fill the device.
A run writes 4 d bytes a row, 1/64 of what one row of a group of 16 makes it read at 256 keys.

The runs follow from the stream's own visible keys alone: MIN_RUN granules each, or as many as make
MAX_RUNS runs. So a stream's bits do not depend on what else is in the call, and the partial results
do not grow with the history.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._attention_index import (
    GRANULE,
    listed_range,
    lowest_key,
    rows_of_stream,
)
from vicostream_kernels.triton_kernels._attention_pages import fold_page_tile
from vicostream_kernels.triton_kernels._attention_tile import (
    above_nothing,
    add_sink,
    empty_state,
    inverse_of,
    load_head,
    log_sum_of,
)
from vicostream_kernels.triton_kernels._sums import product

_GRANULE = tl.constexpr(GRANULE)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Query rows of a stream that is served here.
FEW_QUERIES = 16
_FEW = tl.constexpr(FEW_QUERIES)
# Granules of a run at least, and runs of a stream at most.
MIN_RUN = 4
_MIN_RUN = tl.constexpr(MIN_RUN)
MAX_RUNS = 64
_MAX_RUNS = tl.constexpr(MAX_RUNS)


@triton.jit
def _granules_of_run(listed):
    return tl.maximum(tl.cdiv(listed, _MAX_RUNS), _MIN_RUN)


@triton.jit(
    do_not_specialize=[
        "streams",
        "rows",
        "angle_rows",
        "sink_tokens",
        "window",
        "kv_heads",
        "groups",
        "row_tiles",
        "runs",
    ]
)
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,  # out, [partial rows, heads, runs, HEAD_DIM] fp32: weighted sums of values
    state_ptr,  # out, [partial rows, heads, runs, 2] fp32: maximum (base 2) and total
    cu_seqlens_ptr,
    window_start_ptr,
    totals_ptr,
    slots_ptr,
    turns_ptr,
    angles_ptr,
    streams,
    rows,
    angle_rows,
    sink_tokens,
    window,
    capacity,
    kv_heads,
    groups,
    row_tiles,
    runs,
    scale,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_p,
    k_stride_b,
    k_stride_h,
    k_stride_d,
    v_stride_p,
    v_stride_b,
    v_stride_h,
    v_stride_d,
    TABLES: tl.constexpr,
    BY_ROW: tl.constexpr,  # partial rows are query rows; else _FEW of each stream
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a run of a stream's keys, GROUP heads, every row_tiles-th tile of rows."""
    run = tl.program_id(0) % runs
    heads = tl.program_id(0) // runs % groups
    first_tile = tl.program_id(0) // (runs * groups) % row_tiles
    s = tl.program_id(0) // (runs * groups * row_tiles)
    from_row, queries = rows_of_stream(cu_seqlens_ptr, s, rows)
    # Asked for with the rows: a load that the branch did not need would be put behind it.
    table = s * TABLES + heads % TABLES
    keys = tl.load(totals_ptr + table)
    window_first = 0
    if window_start_ptr is not None:
        window_first = tl.load(window_start_ptr + s)
    if (queries == 0) | (queries > _FEW) | (keys == 0):
        return
    WINDOWED: tl.constexpr = (window is not None) | (window_start_ptr is not None)
    sinks, hidden, listed = listed_range(keys, queries, sink_tokens, window, window_first)
    per_run = _granules_of_run(listed)
    from_place = run * per_run * _GRANULE
    to_place = tl.minimum((run + 1) * per_run, listed) * _GRANULE
    if from_place >= to_place:
        return

    table = table.to(tl.int64)
    slots_ptr += table * capacity
    if angles_ptr is not None:
        turns_ptr += table * capacity
        angles_ptr += table * angle_rows * HEAD_DIM
    kv_head = (heads * kv_heads // groups).to(tl.int64)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    k_strides = (k_stride_p, k_stride_b, k_stride_d)
    v_strides = (v_stride_p, v_stride_b, v_stride_d)
    pages = (k_ptr, v_ptr, slots_ptr, sinks, hidden, k_strides, v_strides)
    low = lowest_key(keys - queries, keys - 1, window, window_first)

    for from_flat in range(first_tile * BLOCK_M, queries * GROUP, row_tiles * BLOCK_M):
        flat = from_flat + tl.arange(0, BLOCK_M)
        live = flat < queries * GROUP
        query = flat // GROUP
        head = (heads * GROUP + flat % GROUP).to(tl.int64)
        q_rows = q_ptr + (from_row + query).to(tl.int64) * q_stride_n + head * q_stride_h
        q_a, q_b = load_head(q_rows, live, q_stride_d, HEAD_DIM, SPLIT, PART_A, PART_B)
        rule = (keys - queries + query, keys - 1, low, sink_tokens, window_first)
        acc_a, acc_b, top, total = empty_state(BLOCK_M, PART_A, PART_B)
        for place in range(from_place, to_place, BLOCK_N):
            start = tl.where(place < sinks, place, place + hidden)
            acc_a, acc_b, top, total = fold_page_tile(
                acc_a, acc_b, top, total, q_a, q_b, start, rule, window, pages,
                turns_ptr, angles_ptr, scale, True, WINDOWED, PAGE_SIZE, HEAD_DIM, SPLIT,
                PART_A, PART_B, BLOCK_N,
            )  # fmt: skip

        partial_row = s * _FEW + query
        if BY_ROW:
            partial_row = from_row + query
        at = (partial_row.to(tl.int64) * groups * GROUP + head) * runs + run
        tl.store(state_ptr + 2 * at, top, mask=live)
        tl.store(state_ptr + 2 * at + 1, total, mask=live)
        partial = partial_ptr + at[:, None] * HEAD_DIM
        c = tl.arange(0, PART_A)[None, :]
        tl.store(partial + c, acc_a, mask=live[:, None] & (c < SPLIT))
        if PART_B > 0:
            c = SPLIT + tl.arange(0, PART_B)[None, :]
            tl.store(partial + c, acc_b, mask=live[:, None] & (c < HEAD_DIM))


@triton.jit(do_not_specialize=["streams", "rows", "sink_tokens", "window", "heads", "runs"])
def combine_kernel(
    partial_ptr,
    state_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    window_start_ptr,
    sink_logits_ptr,
    totals_ptr,
    streams,
    rows,
    sink_tokens,
    window,
    heads,
    runs,
    out_stride_n,
    out_stride_h,
    lse_stride_n,
    TABLES: tl.constexpr,
    BY_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a program
):
    """One program: some channels of one head of one row, all its runs at once, by one warp.

    Sums over warps would take longer than all else. Bound by latency.
    """
    PARTS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    part = tl.program_id(0) % PARTS
    partial_row = tl.program_id(0) // PARTS // heads
    head = tl.program_id(0) // PARTS % heads
    if BY_ROW:
        s = 0
        for first in range(1, streams + 1, 64):
            other = first + tl.arange(0, 64)
            start = tl.load(cu_seqlens_ptr + other, mask=other <= streams, other=rows + 1)
            s += tl.sum((start <= partial_row).to(tl.int32), 0)
        row = partial_row
        padding = s == streams
        s = tl.minimum(s, streams - 1)
        from_row, queries = rows_of_stream(cu_seqlens_ptr, s, rows)
        if (queries > _FEW) & (padding == 0):
            return
    else:
        s = partial_row // _FEW
        from_row, queries = rows_of_stream(cu_seqlens_ptr, s, rows)
        row = from_row + partial_row % _FEW
        padding = False
        if (row >= from_row + queries) | (queries > _FEW):
            return

    keys = tl.load(totals_ptr + s * TABLES + head * TABLES // heads)
    window_first = 0
    if window_start_ptr is not None:
        window_first = tl.load(window_start_ptr + s)
    _, _, listed = listed_range(keys, queries, sink_tokens, window, window_first)
    used = tl.cdiv(listed, _granules_of_run(listed))
    used = tl.where(padding, 0, used)

    c = part * CHANNELS + tl.arange(0, CHANNELS)
    at = (partial_row.to(tl.int64) * heads + head) * runs
    run = tl.arange(0, _MAX_RUNS)
    live = run < used
    tops = tl.load(state_ptr + 2 * (at + run), mask=live, other=-float("inf"))
    totals = tl.load(state_ptr + 2 * (at + run) + 1, mask=live, other=0.0)
    mask = live[:, None] & (c < HEAD_DIM)[None, :]
    sums = tl.load(partial_ptr + (at + run)[:, None] * HEAD_DIM + c[None, :], mask, other=0.0)
    top = tl.max(tops, 0) + tl.zeros((1,), tl.float32)
    weights = tl.exp2(tops - above_nothing(top))
    total = tl.sum(product(weights, totals), 0) + tl.zeros((1,), tl.float32)
    acc = tl.sum(product(weights[:, None], sums), 0)
    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + head).to(tl.float32) * _LOG2_E
        shrink, top, total = add_sink(top, total, sink)
        acc *= shrink
    wide_row = row.to(tl.int64)
    out = out_ptr + wide_row * out_stride_n + head.to(tl.int64) * out_stride_h + c
    tl.store(out, (acc * inverse_of(total)).to(out_ptr.dtype.element_ty), mask=c < HEAD_DIM)
    if lse_ptr is not None:
        log_sum = log_sum_of(top, total)
        at = lse_ptr + wide_row * lse_stride_n + head + tl.arange(0, 1)
        tl.store(at, log_sum, mask=(part + tl.arange(0, 1)) == 0)
