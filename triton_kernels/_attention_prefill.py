"""attention: the streams with many query rows, one tile of rows against all keys that it sees.

What bounds it: tensor cores. A tile of M rows does 4 M d operations on a key of 4 d bytes (16
bits), so 128 rows do 128 operations a byte, and what the tiles of a head read twice comes from the
L2 cache. The query heads of a KV head stand in one tile, so that few queries fill it too.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._attention_index import (
    listed_range,
    lowest_key,
)
from vicostream_kernels.triton_kernels._attention_pages import fold_page_tile
from vicostream_kernels.triton_kernels._attention_tile import (
    add_sink,
    empty_state,
    inverse_of,
    load_head,
    log_sum_of,
    store_head,
)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stream_of_tile(
    cu_seqlens_ptr, tile, streams, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The stream that tile belongs to; streams itself for the padding behind the last one."""
    found = 0
    for first in range(1, streams + 1, 64):
        s = first + tl.arange(0, 64)
        start = tl.load(cu_seqlens_ptr + s, mask=s <= streams, other=0)
        start = tl.minimum(tl.maximum(start, 0), rows) * GROUP // BLOCK_M + s
        found += tl.sum(((s <= streams) & (start <= tile)).to(tl.int32), 0)
    return found


@triton.jit(
    do_not_specialize=[
        "streams",
        "rows",
        "angle_rows",
        "sink_tokens",
        "window",
        "kv_heads",
        "few_queries",
    ]
)
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # None: not asked for
    cu_seqlens_ptr,
    window_start_ptr,
    sink_logits_ptr,
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
    few_queries,  # streams of up to so many queries are the split kernel's
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
    out_stride_n,
    out_stride_h,
    lse_stride_n,
    TABLES: tl.constexpr,  # of a stream
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a tile
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows (query, head) of one stream and GROUP heads that share their keys.

    The tiles are found on the device: stream s has its tiles from cu_seqlens[s] GROUP / BLOCK_M + s
    on, so their number has a bound that the host knows. Late tiles see most and start first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    heads = tl.program_id(1)
    s = _stream_of_tile(cu_seqlens_ptr, tile, streams, rows, GROUP, BLOCK_M)
    from_row = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s), 0), rows)
    to_row = tl.load(cu_seqlens_ptr + s + 1, mask=s < streams, other=rows)
    queries = tl.minimum(to_row, rows) - from_row
    from_flat = (tile - (from_row * GROUP // BLOCK_M + s)) * BLOCK_M
    if ((s < streams) & (queries <= few_queries)) | (from_flat >= queries * GROUP):
        return

    flat = from_flat + tl.arange(0, BLOCK_M)
    live = flat < queries * GROUP
    query = flat // GROUP
    head = (heads * GROUP + flat % GROUP).to(tl.int64)
    row = (from_row + query).to(tl.int64)
    q_rows = q_ptr + row * q_stride_n + head * q_stride_h
    q_a, q_b = load_head(q_rows, live, q_stride_d, HEAD_DIM, SPLIT, PART_A, PART_B)

    # Padding has no keys, and its rows end as those that see nothing.
    table = s * TABLES + heads % TABLES
    keys = tl.load(totals_ptr + table, mask=s < streams, other=0)
    i = keys - queries + query
    first_i = keys - queries + from_flat // GROUP
    last_i = keys - queries + (from_flat + BLOCK_M - 1) // GROUP
    last_i = tl.maximum(tl.minimum(last_i, keys - 1), -1)

    # In tiles of keys: the sinks [0, sink_end), then [from_tile, whole_from) at the window's start,
    # [whole_from, whole_to) that every row sees all of, and [whole_to, to_tile).
    WINDOWED: tl.constexpr = (window is not None) | (window_start_ptr is not None)
    to_tile = tl.cdiv(last_i + 1, BLOCK_N)
    sink_end = 0
    from_tile = 0
    whole_from = 0
    sinks = 0
    hidden = 0
    low = 0
    window_first = 0
    if WINDOWED:
        if window_start_ptr is not None:
            window_first = tl.load(window_start_ptr + s, mask=s < streams, other=0)
        sinks, hidden, _ = listed_range(keys, queries, sink_tokens, window, window_first)
        low = lowest_key(first_i, last_i, window, window_first)
        whole_low = lowest_key(last_i, last_i, window, window_first)
        sink_end = tl.cdiv(tl.minimum(sink_tokens, last_i + 1), BLOCK_N)
        from_tile = tl.minimum(tl.maximum(low // BLOCK_N, sink_end), to_tile)
        whole_from = tl.minimum(tl.maximum(tl.cdiv(whole_low, BLOCK_N), from_tile), to_tile)
    whole_to = tl.maximum(first_i + 1, 0) // BLOCK_N
    whole_to = tl.minimum(tl.maximum(whole_to, whole_from), to_tile)

    table = table.to(tl.int64)
    slots_ptr += table * capacity
    if angles_ptr is not None:
        turns_ptr += table * capacity
        angles_ptr += table * angle_rows * HEAD_DIM
    kv_head = (heads * kv_heads // tl.num_programs(1)).to(tl.int64)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    k_strides = (k_stride_p, k_stride_b, k_stride_d)
    v_strides = (v_stride_p, v_stride_b, v_stride_d)
    pages = (k_ptr, v_ptr, slots_ptr, sinks, hidden, k_strides, v_strides)
    rule = (i, last_i, low, sink_tokens, window_first)

    acc_a, acc_b, top, total = empty_state(BLOCK_M, PART_A, PART_B)
    if WINDOWED:
        for n in range(0, sink_end + whole_from - from_tile):
            start = tl.where(n < sink_end, n, n - sink_end + from_tile) * BLOCK_N
            acc_a, acc_b, top, total = fold_page_tile(
                acc_a, acc_b, top, total, q_a, q_b, start, rule, window, pages,
                turns_ptr, angles_ptr, scale, True, True, PAGE_SIZE, HEAD_DIM, SPLIT,
                PART_A, PART_B, BLOCK_N,
            )  # fmt: skip
    for n in range(whole_from, whole_to):
        acc_a, acc_b, top, total = fold_page_tile(
            acc_a, acc_b, top, total, q_a, q_b, n * BLOCK_N, rule, window, pages,
            turns_ptr, angles_ptr, scale, False, WINDOWED, PAGE_SIZE, HEAD_DIM, SPLIT,
            PART_A, PART_B, BLOCK_N,
        )  # fmt: skip
    for n in range(whole_to, to_tile):
        acc_a, acc_b, top, total = fold_page_tile(
            acc_a, acc_b, top, total, q_a, q_b, n * BLOCK_N, rule, window, pages,
            turns_ptr, angles_ptr, scale, True, WINDOWED, PAGE_SIZE, HEAD_DIM, SPLIT,
            PART_A, PART_B, BLOCK_N,
        )  # fmt: skip
    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + head, mask=live, other=0.0).to(tl.float32) * _LOG2_E
        shrink, top, total = add_sink(top, total, sink)
        acc_a *= shrink[:, None]
        if PART_B > 0:
            acc_b *= shrink[:, None]

    inverse = inverse_of(total)[:, None]
    out_rows = out_ptr + row * out_stride_n + head * out_stride_h
    store_head(out_rows, live, acc_a * inverse, acc_b * inverse, HEAD_DIM, SPLIT, PART_A, PART_B)
    if lse_ptr is not None:
        tl.store(lse_ptr + row * lse_stride_n + head, log_sum_of(top, total), mask=live)
