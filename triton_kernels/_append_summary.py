"""append: sums and bounds of the keys of each touched block.

What bounds it: latency. The sums run in token order, so that one call gives the bits of two, and a
block is one chain of additions per channel. No float atomics, and no work for untouched blocks.
"""

import triton
import triton.language as tl


@triton.jit
def _count_between(rows_ptr, start, stop, from_row, to_row, SIZE: tl.constexpr):
    """How many of the tokens start to start + SIZE, of those below stop, have such a row."""
    n = start + tl.arange(0, SIZE)
    row = tl.load(rows_ptr + n, mask=n < stop, other=-1)
    return tl.sum(((row >= from_row) & (row < to_row)).to(tl.int32), 0)


@triton.jit
def _fold(
    total,
    low,
    high,
    keys_ptr,
    rows_ptr,
    key_offsets_ptr,
    start,
    tokens,
    c,
    from_row,
    to_row,
    part_row,
    HAS_BOUNDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sum, minimum and maximum after the tokens start to start + SIZE, taken in this order.

    The sum is of the rows from_row to to_row, the bounds are of part_row alone.
    """
    # The compiler keeps loads in order, so all of them stand before the first use of one.
    rows = ()
    offsets = ()
    rows_ptr += start
    key_offsets_ptr += start
    left = tokens - start
    for i in tl.static_range(SIZE):
        rows = rows + (tl.load(rows_ptr + i, mask=i < left, other=-1),)
        offsets = offsets + (tl.load(key_offsets_ptr + i, mask=i < left, other=0),)
    keys = ()
    for i in tl.static_range(SIZE):
        channels = tl.where((rows[i] >= from_row) & (rows[i] < to_row), HEAD_DIM, 0)
        keys = keys + (tl.load(keys_ptr + offsets[i], mask=c < channels, other=0.0),)
    for i in tl.static_range(SIZE):
        key = keys[i].to(tl.float32)
        # Selected, not added as 0: -0.0 + 0.0 has other bits than -0.0.
        total = tl.where((rows[i] >= from_row) & (rows[i] < to_row), total + key, total)
        if HAS_BOUNDS:
            in_part = rows[i] == part_row
            less = tl.minimum(low, key, propagate_nan=tl.PropagateNan.ALL)
            more = tl.maximum(high, key, propagate_nan=tl.PropagateNan.ALL)
            low = tl.where(in_part, less, low)
            high = tl.where(in_part, more, high)
    return total, low, high


@triton.jit(
    do_not_specialize=["tokens", "parts"],
    do_not_specialize_on_alignment=["count_ptr"],  # a layer's row of a table that grows
)
def summary_kernel(
    keys_ptr,  # what the key offsets count from: the pages, or k for a summary of raw keys
    rows_ptr,
    key_offsets_ptr,
    sum_ptr,
    count_ptr,
    kmin_ptr,
    kmax_ptr,
    tokens,
    parts,
    keys_stride_h,
    keys_stride_d,
    sum_stride_b,
    sum_stride_h,
    sum_stride_d,
    count_stride_b,
    kmin_stride_b,
    kmin_stride_s,
    kmin_stride_h,
    kmin_stride_d,
    kmax_stride_b,
    kmax_stride_s,
    kmax_stride_h,
    kmax_stride_d,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: the blocks whose first token of this call lies in a tile of TILE tokens, for one
    head, one part of a block and CHANNELS channels.

    The row of a token is block * parts + part, or -1. A block belongs to the program that holds its
    first token, and a first token follows one of another block. So all but a few programs leave
    after two loads; with R runs of tokens the call reads O(N + R N / SCAN) rows, whatever the size
    of the tables. The owner folds its tokens in order. That is a chain of additions, but the loads
    do not depend on it: UNROLL keys are in flight at a time. What bounds a block is thus two round
    trips to the L2 cache for every UNROLL tokens and some 17 instructions a token, 23 with bounds.
    """
    first = tl.program_id(0) * TILE
    head = (tl.program_id(1) // parts).to(tl.int64)
    part = tl.program_id(1) % parts
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < HEAD_DIM
    # Part 0 also makes the sum, of the whole block; the others read their part only.
    summed = c < tl.where(part == 0, HEAD_DIM, 0)
    wide_c = c.to(tl.int64)
    keys_ptr += head * keys_stride_h + wide_c * keys_stride_d

    n = first + tl.arange(0, TILE)
    row = tl.load(rows_ptr + n, mask=n < tokens, other=-1)
    row_before = tl.load(rows_ptr + n - 1, mask=(n > 0) & (n < tokens), other=-1)
    # Rounded down to the first row of the block; -1 stays negative.
    block_row = tl.where(row < 0, -1, row // parts * parts)
    starts = (row >= 0) & ((row_before < block_row) | (row_before >= block_row + parts))
    start = tl.min(tl.where(starts, n, tokens), 0)
    while start < tokens:
        from_row = tl.max(tl.where(n == start, block_row, -1), 0)
        to_row = from_row + parts

        seen = 0
        scan_from = 0
        while (scan_from < start) & (seen == 0):
            seen = _count_between(rows_ptr, scan_from, start, from_row, to_row, SCAN)
            scan_from += SCAN

        if seen == 0:
            block = (from_row // parts).to(tl.int64)
            part_row = from_row + part
            fold_from_row = part_row
            fold_to_row = part_row + 1
            if sum_ptr is not None:
                fold_from_row = tl.where(part == 0, from_row, part_row)
                fold_to_row = tl.where(part == 0, to_row, part_row + 1)

            total = tl.zeros((CHANNELS,), tl.float32)
            low = tl.zeros((CHANNELS,), tl.float32)
            high = tl.zeros((CHANNELS,), tl.float32)
            if sum_ptr is not None:
                sums = sum_ptr + block * sum_stride_b + head * sum_stride_h + wide_c * sum_stride_d
                total = tl.load(sums, mask=summed, other=0.0)
            if kmin_ptr is not None:
                lows = kmin_ptr + block * kmin_stride_b + part.to(tl.int64) * kmin_stride_s
                lows += head * kmin_stride_h + wide_c * kmin_stride_d
                low = tl.load(lows, mask=inside, other=0.0)
                highs = kmax_ptr + block * kmax_stride_b + part.to(tl.int64) * kmax_stride_s
                highs += head * kmax_stride_h + wide_c * kmax_stride_d
                high = tl.load(highs, mask=inside, other=0.0)

            count = 0
            scan_from = start
            while scan_from < tokens:
                hits = _count_between(rows_ptr, scan_from, tokens, from_row, to_row, SCAN)
                count += hits
                if hits > 0:
                    fold_from = scan_from
                    while (fold_from < scan_from + SCAN) & (fold_from < tokens):
                        total, low, high = _fold(
                            total,
                            low,
                            high,
                            keys_ptr,
                            rows_ptr,
                            key_offsets_ptr,
                            fold_from,
                            tokens,
                            c,
                            fold_from_row,
                            fold_to_row,
                            part_row,
                            kmin_ptr is not None,
                            HEAD_DIM,
                            UNROLL,
                        )
                        fold_from += UNROLL
                scan_from += SCAN

            if sum_ptr is not None:
                tl.store(sums, total, mask=summed)
            if kmin_ptr is not None:
                tl.store(lows, low, mask=inside)
                tl.store(highs, high, mask=inside)
            if count_ptr is not None:
                if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
                    counter = count_ptr + block * count_stride_b
                    tl.store(counter, tl.load(counter) + count)

        start = tl.min(tl.where(starts & (n > start), n, tokens), 0)
