"""append: q and k rotated by angles that hold for days of stream, and written to their pages.

What bounds it: memory. Rotating moves 2 N H d + 4 N G d elements (5 N G d with raw pages) and
computes next to nothing: 320 tokens of a 7B model in bf16 are 6 MB. So the kernel has to keep
enough loads in flight, and to keep the angles off the critical path: they cost some 50 instructions
each, are computed once per (token, frequency) of a program, and are shared by its heads in
registers.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._angles import cos_sin, turns_per_position


@triton.jit
def _store_pair(ptrs, to_high, low, high, mask):
    tl.store(ptrs, low.to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + to_high, high.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _store_rotated(ptrs, to_high, low, high, cos, sin, mask):
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    _store_pair(ptrs, to_high, low * cos - high * sin, high * cos + low * sin, mask)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "q_heads",
        "kv_heads",
        "height_from",
        "width_from",
        "page_size",
        "slot_count",
        "blocks",
        "parts",
        "positions_stride_a",  # the number of tokens, usually
    ]
)
def rotate_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    inv_freq_ptr,
    slots_ptr,
    q_out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    raw_k_pages_ptr,  # None: there is no un-rotated pool
    block_of_page_ptr,
    rows_ptr,  # [tokens] int32 and [tokens] int64, for the summary kernel; None: no summary
    key_offsets_ptr,
    tokens,
    q_heads,
    kv_heads,
    height_from,  # frequencies below turn with row 0 of the positions, then row 1, then row 2
    width_from,
    page_size,
    slot_count,
    blocks,
    parts,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    positions_stride_a,
    positions_stride_n,
    inv_freq_stride_f,
    slots_stride_n,
    q_out_stride_n,
    q_out_stride_h,
    q_out_stride_d,
    k_pages_stride_p,
    k_pages_stride_b,
    k_pages_stride_h,
    k_pages_stride_d,
    v_pages_stride_p,
    v_pages_stride_b,
    v_pages_stride_h,
    v_pages_stride_d,
    raw_k_pages_stride_p,
    raw_k_pages_stride_b,
    raw_k_pages_stride_h,
    raw_k_pages_stride_d,
    block_of_page_stride_p,
    SUMMARY_RAW: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    FREQUENCIES: tl.constexpr,  # HALF up to a power of two
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: TOKENS tokens times HEADS heads, either of q or of k and v.

    The group of heads varies fastest, so that programs that run together read whole rows of q. The
    tile is [tokens, heads, frequencies] in this order, for which Triton spreads the threads over
    frequencies, then tokens: a thread holds one vector of frequencies of one token and all heads,
    so that it computes each of its angles once and exchanges nothing (the compile gate counts).
    """
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(kv_heads, HEADS)
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups

    n = tile * TOKENS + tl.arange(0, TOKENS)
    live = n < tokens
    n = n.to(tl.int64)
    f = tl.arange(0, FREQUENCIES)
    inside = f < HALF

    inv_freq = tl.load(inv_freq_ptr + f * inv_freq_stride_f, mask=inside, other=0.0)
    position_ptrs = positions_ptr + n * positions_stride_n
    time = tl.load(position_ptrs, mask=live, other=0)
    height = tl.load(position_ptrs + positions_stride_a, mask=live, other=0)
    width = tl.load(position_ptrs + 2 * positions_stride_a, mask=live, other=0)
    positions = tl.where(
        (f < height_from)[None, :],
        time[:, None],
        tl.where((f < width_from)[None, :], height[:, None], width[:, None]),
    )
    cos, sin = cos_sin(positions, turns_per_position(inv_freq)[None, :])
    cos = cos[:, None, :]
    sin = sin[:, None, :]

    d = f.to(tl.int64)[None, None, :]
    row = n[:, None, None]
    if group < q_groups:
        q_head = group * HEADS + tl.arange(0, HEADS)
        q_mask = live[:, None, None] & (q_head < q_heads)[None, :, None] & inside[None, None, :]
        q_head = q_head.to(tl.int64)[None, :, None]
        q_in = q_ptr + row * q_stride_n + q_head * q_stride_h + d * q_stride_d
        low = tl.load(q_in, mask=q_mask, other=0.0)
        high = tl.load(q_in + HALF * q_stride_d, mask=q_mask, other=0.0)
        q_rotated = q_out_ptr + row * q_out_stride_n + q_head * q_out_stride_h + d * q_out_stride_d
        _store_rotated(q_rotated, HALF * q_out_stride_d, low, high, cos, sin, q_mask)
    else:
        slot = tl.load(slots_ptr + n * slots_stride_n, mask=live, other=-1)
        written = (slot >= 0) & (slot < slot_count)
        slot = tl.where(written, slot, 0)
        page = (slot // page_size).to(tl.int64)
        offset = (slot % page_size).to(tl.int64)

        if rows_ptr is not None:
            if group == q_groups:
                block = tl.load(
                    block_of_page_ptr + page * block_of_page_stride_p, mask=written, other=-1
                )
                counted = (block >= 0) & (block < blocks)
                part = slot % page_size * parts // page_size
                tl.store(rows_ptr + n, tl.where(counted, block * parts + part, -1), mask=live)
                if SUMMARY_RAW:
                    key_offset = n * k_stride_n
                else:
                    key_offset = page * k_pages_stride_p + offset * k_pages_stride_b
                tl.store(key_offsets_ptr + n, key_offset, mask=live)

        page = page[:, None, None]
        offset = offset[:, None, None]
        head = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        mask = written[:, None, None] & (head < kv_heads)[None, :, None] & inside[None, None, :]
        head = head.to(tl.int64)[None, :, None]
        k_in = k_ptr + row * k_stride_n + head * k_stride_h + d * k_stride_d
        v_in = v_ptr + row * v_stride_n + head * v_stride_h + d * v_stride_d
        k_low = tl.load(k_in, mask=mask, other=0.0)
        k_high = tl.load(k_in + HALF * k_stride_d, mask=mask, other=0.0)
        v_low = tl.load(v_in, mask=mask, other=0.0)
        v_high = tl.load(v_in + HALF * v_stride_d, mask=mask, other=0.0)

        v_paged = v_pages_ptr + page * v_pages_stride_p + offset * v_pages_stride_b
        v_paged += head * v_pages_stride_h + d * v_pages_stride_d
        _store_pair(v_paged, HALF * v_pages_stride_d, v_low, v_high, mask)
        if raw_k_pages_ptr is not None:
            raw_paged = (
                raw_k_pages_ptr + page * raw_k_pages_stride_p + offset * raw_k_pages_stride_b
            )
            raw_paged += head * raw_k_pages_stride_h + d * raw_k_pages_stride_d
            _store_pair(raw_paged, HALF * raw_k_pages_stride_d, k_low, k_high, mask)
        k_paged = k_pages_ptr + page * k_pages_stride_p + offset * k_pages_stride_b
        k_paged += head * k_pages_stride_h + d * k_pages_stride_d
        _store_rotated(k_paged, HALF * k_pages_stride_d, k_low, k_high, cos, sin, mask)
