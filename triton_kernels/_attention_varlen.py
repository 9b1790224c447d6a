"""attention: packed windows without a mask (the ViT's), and the merging of two results.

What bounds the windows: memory. 64 patches of 80 channels in 16 bits are 1.3 M operations on 40 KB,
32 a byte; full frames are bound by tensor cores. One tile of 64 rows is one window, whose queries,
keys and values are read once. The merge moves 3 Q H d elements, and is bound by that.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._attention_index import rows_of_stream
from vicostream_kernels.triton_kernels._attention_tile import (
    above_nothing,
    empty_state,
    fold_tile,
    inverse_of,
    load_head,
    scores_of,
    store_head,
)


@triton.jit
def _fold_row_tile(
    acc_a,
    acc_b,
    top,
    total,
    q_a,
    q_b,
    j,
    keys,
    k_ptr,
    v_ptr,
    k_stride_n,
    k_stride_d,
    v_stride_n,
    v_stride_d,
    scale,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
):
    """The rows' state after the keys j, of which those below keys are theirs."""
    live = None
    if MASKED:
        live = j < keys
    wide_j = j.to(tl.int64)
    k_rows = k_ptr + wide_j * k_stride_n
    v_rows = v_ptr + wide_j * v_stride_n
    k_a, k_b = load_head(k_rows, live, k_stride_d, HEAD_DIM, SPLIT, PART_A, PART_B)
    v_a, v_b = load_head(v_rows, live, v_stride_d, HEAD_DIM, SPLIT, PART_A, PART_B)
    scores = scores_of(q_a, q_b, k_a, k_b, PART_B)
    if MASKED:
        scores = tl.where(live[None, :], scores, -float("inf"))
    return fold_tile(acc_a, acc_b, top, total, scores, scale, v_a, v_b, PART_B)


@triton.jit(do_not_specialize=["windows", "q_rows", "k_rows", "heads", "row_tiles"])
def varlen_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    windows,
    q_rows,
    k_rows,
    heads,
    row_tiles,
    scale,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    out_stride_n,
    out_stride_h,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one head of one window, every row_tiles-th tile of its rows.

    row_tiles is the caller's bound, so there is one tile to a program, unless the bound was wrong.
    The padding behind the last window is one more window, without keys.
    """
    first_tile = tl.program_id(0) % row_tiles
    head = (tl.program_id(0) // row_tiles % heads).to(tl.int64)
    w = tl.program_id(0) // (row_tiles * heads)
    from_row = tl.minimum(tl.maximum(tl.load(cu_seqlens_q_ptr + w), 0), q_rows)
    to_row = tl.load(cu_seqlens_q_ptr + w + 1, mask=w < windows, other=q_rows)
    queries = tl.minimum(to_row, q_rows) - from_row
    from_key, keys = rows_of_stream(cu_seqlens_k_ptr, tl.minimum(w, windows - 1), k_rows)
    keys = tl.where(w < windows, keys, 0)
    k_ptr += from_key.to(tl.int64) * k_stride_n + head * k_stride_h
    v_ptr += from_key.to(tl.int64) * v_stride_n + head * v_stride_h
    whole = keys // BLOCK_N * BLOCK_N

    for from_query in range(first_tile * BLOCK_M, queries, row_tiles * BLOCK_M):
        query = from_query + tl.arange(0, BLOCK_M)
        live = query < queries
        row = (from_row + query).to(tl.int64)
        q_rows_ptr = q_ptr + row * q_stride_n + head * q_stride_h
        q_a, q_b = load_head(q_rows_ptr, live, q_stride_d, HEAD_DIM, SPLIT, PART_A, PART_B)
        acc_a, acc_b, top, total = empty_state(BLOCK_M, PART_A, PART_B)
        for start in range(0, whole, BLOCK_N):
            acc_a, acc_b, top, total = _fold_row_tile(
                acc_a, acc_b, top, total, q_a, q_b, start + tl.arange(0, BLOCK_N), keys,
                k_ptr, v_ptr, k_stride_n, k_stride_d, v_stride_n, v_stride_d, scale,
                False, HEAD_DIM, SPLIT, PART_A, PART_B,
            )  # fmt: skip
        for start in range(whole, keys, BLOCK_N):
            acc_a, acc_b, top, total = _fold_row_tile(
                acc_a, acc_b, top, total, q_a, q_b, start + tl.arange(0, BLOCK_N), keys,
                k_ptr, v_ptr, k_stride_n, k_stride_d, v_stride_n, v_stride_d, scale,
                True, HEAD_DIM, SPLIT, PART_A, PART_B,
            )  # fmt: skip
        inverse = inverse_of(total)[:, None]
        out_rows = out_ptr + row * out_stride_n + head * out_stride_h
        store_head(
            out_rows, live, acc_a * inverse, acc_b * inverse, HEAD_DIM, SPLIT, PART_A, PART_B
        )


@triton.jit(do_not_specialize=["rows", "heads"])
def merge_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,  # [rows, heads, HEAD_DIM] and [rows, heads], dense
    lse_ptr,
    rows,
    heads,
    out_a_stride_n,
    out_a_stride_h,
    out_a_stride_d,
    lse_a_stride_n,
    lse_a_stride_h,
    out_b_stride_n,
    out_b_stride_h,
    out_b_stride_d,
    lse_b_stride_n,
    lse_b_stride_h,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS pairs of a row and a head."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < rows.to(tl.int64) * heads
    n = at // heads
    h = at % heads
    c = tl.arange(0, CHANNELS)[None, :]
    mask = live[:, None] & (c < HEAD_DIM)
    lse_a = tl.load(lse_a_ptr + n * lse_a_stride_n + h * lse_a_stride_h, mask=live, other=0.0)
    lse_b = tl.load(lse_b_ptr + n * lse_b_stride_n + h * lse_b_stride_h, mask=live, other=0.0)
    at_a = out_a_ptr + (n * out_a_stride_n + h * out_a_stride_h)[:, None]
    at_b = out_b_ptr + (n * out_b_stride_n + h * out_b_stride_h)[:, None]
    # A part that saw nothing is not read, whatever it holds.
    saw_a = (lse_a != -float("inf"))[:, None]
    saw_b = (lse_b != -float("inf"))[:, None]
    out_a = tl.load(at_a + c.to(tl.int64) * out_a_stride_d, mask=mask & saw_a, other=0.0)
    out_b = tl.load(at_b + c.to(tl.int64) * out_b_stride_d, mask=mask & saw_b, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    subtract = above_nothing(top)
    weight_a = tl.exp(lse_a - subtract)
    weight_b = tl.exp(lse_b - subtract)
    total = weight_a + weight_b
    out = out_a.to(tl.float32) * weight_a[:, None] + out_b.to(tl.float32) * weight_b[:, None]
    out *= inverse_of(total)[:, None]
    tl.store(out_ptr + at[:, None] * HEAD_DIM + c, out.to(out_ptr.dtype.element_ty), mask=mask)
    # log(0) = -inf: rows that saw nothing in both
    tl.store(lse_ptr + at, top + tl.log(total), mask=live)
