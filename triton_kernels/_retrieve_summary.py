"""retrieve: mean, or smallest and largest, of the keys of each block, from their pages."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._compact import wide


@triton.jit(
    do_not_specialize=[
        "pages", "page_size", "blocks", "listed", "heads", "parts",
        "table_stride_s",  # grows with the history
    ],
    do_not_specialize_on_alignment=["table_ptr", "count_ptr"],  # their first row moves on
)  # fmt: skip
def summary_kernel(
    k_ptr,
    table_ptr,
    fill_ptr,
    mean_ptr,  # [S, NB, G, d] float32, or None
    count_ptr,  # [S, NB] int32 beside the mean
    kmin_ptr,  # [S, NB, parts, G, d] float32, or None
    kmax_ptr,
    pages,
    page_size,
    blocks,
    listed,
    heads,
    parts,
    k_stride_p,
    k_stride_b,
    k_stride_h,
    k_stride_d,
    table_stride_s,
    table_stride_n,
    table_stride_m,
    fill_stride_p,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one head of one part of a block. Tokens are added one after another, as append
    adds them, so both have the same bits.

    What bounds it: memory for long histories, each key read once; for short ones the chain of
    additions, of which UNROLL loads are in flight.
    """
    row = (tl.program_id(0) // heads).to(tl.int64)  # (s * NB + b) * parts + part
    head = (tl.program_id(0) % heads).to(tl.int64)
    part = (row % parts).to(tl.int32)
    block = row // parts
    c = tl.arange(0, CHANNELS)
    inside = c < HEAD_DIM
    table_ptr += block // blocks * table_stride_s + block % blocks * table_stride_n
    k_ptr += head * k_stride_h
    first = tl.cdiv(part * page_size, parts)
    stop = tl.cdiv((part + 1) * page_size, parts)

    total = tl.zeros((CHANNELS,), tl.float32)
    low = tl.full((CHANNELS,), float("inf"), tl.float32)
    high = tl.full((CHANNELS,), float("-inf"), tl.float32)
    count = 0
    for m in range(0, listed):
        page = tl.load(table_ptr + wide(m) * table_stride_m)
        is_listed = (page >= 0) & (page < pages)
        page = page.to(tl.int64)
        fill = tl.load(fill_ptr + page * fill_stride_p, mask=is_listed, other=0)
        fill = tl.minimum(tl.maximum(fill, 0), page_size)
        count += fill
        keys_ptr = k_ptr + page * k_stride_p
        last = tl.minimum(stop, fill)
        for start in range(first, last, UNROLL):
            # The compiler keeps loads in order, so all of them stand before the first use of one.
            keys = ()
            for i in tl.static_range(UNROLL):
                offset = start + i
                # One comparison: Triton 3.9's interpreter cannot "and" one condition with many.
                there = c < tl.where(offset < last, HEAD_DIM, 0)
                at = wide(offset) * k_stride_b + c.to(tl.int64) * k_stride_d
                keys = keys + (tl.load(keys_ptr + at, mask=there, other=0.0),)
            for i in tl.static_range(UNROLL):
                there = start + i < last
                key = keys[i].to(tl.float32)
                if mean_ptr is not None:
                    total = tl.where(there, total + key, total)
                else:
                    less = tl.minimum(low, key, propagate_nan=tl.PropagateNan.ALL)
                    more = tl.maximum(high, key, propagate_nan=tl.PropagateNan.ALL)
                    low = tl.where(there, less, low)
                    high = tl.where(there, more, high)
    at = (row * heads + head) * HEAD_DIM + c
    if mean_ptr is not None:
        tokens = tl.zeros((CHANNELS,), tl.float32) + tl.maximum(count, 1)
        mean = tl.where(count > 0, tl.div_rn(total, tokens), float("nan"))
        tl.store(mean_ptr + at, mean, mask=inside)
        if head == 0:
            tl.store(count_ptr + block, count)
    else:
        tl.store(kmin_ptr + at, low, mask=inside)
        tl.store(kmax_ptr + at, high, mask=inside)
