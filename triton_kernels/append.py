"""append in Triton: rotate q and k, write the pages, update the summaries of the touched blocks.

`rope_append` has the semantics of the raw op `vicostream::rope_append`; the contract, and the
checks of its arguments, are in `vicostream_kernels.ops.append`. Nothing here waits for the device.

What bounds it. Rotating moves 2 N H d + 4 N G d elements (5 N G d with raw pages) and computes next
to nothing: 320 tokens of a 7B model in bf16 are 6 MB. So `_rotate_kernel` has to keep enough loads
in flight, and to keep the angles off the critical path: they cost some 50 instructions each, are
computed once per (token, frequency) of a program, and are shared by its heads in registers.

The summary is bound by latency instead: its sums run in token order (one call must equal two calls
bit for bit), so a block is one chain of additions per channel. See `_summary_kernel`.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# 2^65 / 2 pi, to the nearest integer. It fits into 63 bits, so that signed and unsigned agree.
_TURN = tl.constexpr(5871781006564002453)
# A phase that was shifted left by two counts quarter turns in units of 2^-32.
_QUARTER = tl.constexpr(math.pi / 2 / 2**32)


@triton.jit
def _turns_per_position(inv_freq):
    """inv_freq / 2 pi in units of 2^-64 turns, as int64 that wraps at a whole turn.

    Integers, because the product with a position then reduces itself modulo one turn and is exact:
    neither fp64 nor a splitting of the position is needed. The error is below 1.25 units of 2^-63
    turns for frequencies below 2, hence below 2e-9 radians at every int32 position.
    """
    bits = inv_freq.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    # inv_freq = mantissa 2^(exponent - 150), and scaled = mantissa 2^40 / 2 pi.
    scaled = tl.umulhi(mantissa << 39, tl.full(mantissa.shape, _TURN, tl.int64))
    right = tl.minimum(tl.maximum(126 - exponent, 0), 63).to(tl.int64)
    left = tl.minimum(tl.maximum(exponent - 126, 0), 63).to(tl.int64)
    turns = (scaled >> right) << left
    return tl.where(bits < 0, -turns, turns)


@triton.jit
def _cos_sin(positions, turns):
    """Cosine and sine of positions * turns, within 1.5e-7 at every int32 position.

    The top 32 bits of the product are the phase. Its nearest quarter turn is taken off as an
    integer, so what fp32 rounds is at most an eighth of a turn. The polynomials are the
    single-precision ones of Cephes: libdevice's sin and cos bring a slow path with local memory.
    """
    phase = ((positions.to(tl.int64) * turns) >> 32).to(tl.int32)
    quadrant = ((phase >> 29) + 1) >> 1
    x = (phase << 2).to(tl.float32) * _QUARTER
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 + z * (-0.5 + z * (4.1666645683e-2 + z * (-1.3887316255e-3 + z * 2.4433157118e-5)))
    odd = (quadrant & 1) != 0
    swapped_cos = tl.where(odd, sin, cos)
    swapped_sin = tl.where(odd, cos, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -swapped_cos, swapped_cos)
    sin = tl.where((quadrant & 2) != 0, -swapped_sin, swapped_sin)
    return cos, sin


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
    ]
)
def _rotate_kernel(
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
    cos, sin = _cos_sin(positions, _turns_per_position(inv_freq)[None, :])
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


@triton.jit(do_not_specialize=["tokens", "parts"])
def _summary_kernel(
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


def _strides(tensor: torch.Tensor | None, name: str, axes: str) -> dict[str, int]:
    """The stride arguments of one tensor, named after its axes; 0 where there is no tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def _rotate_config(half: int, itemsize: int) -> tuple[int, int, int]:
    """(tokens of a program, heads of a program, warps).

    Two warps take as many tokens as give each thread one vector of 16 bytes per head, so that it
    computes the angles of that vector once; four heads then keep 8 loads per thread in flight for q
    and 16 for k and v, which is as much as fits into the registers without a spill in fp32.
    """
    warps = 2
    vectors = max(1, half * itemsize // 16)
    return max(1, 32 * warps // vectors), 4, warps


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    mrope_section: Sequence[int] | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    q_out: torch.Tensor,
    raw_k_pages: torch.Tensor | None = None,
    sum: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    kmin: torch.Tensor | None = None,
    kmax: torch.Tensor | None = None,
    summary_raw: bool = False,
    block_of_page: torch.Tensor | None = None,
) -> None:
    """Rotates q and k by their positions, writes q_out and the pages, updates the summary.

    The arguments are those of the raw op `vicostream::rope_append`, which has checked them: q and
    q_out [N,H,d], k and v [N,G,d], positions [3,N] int32, inv_freq [d/2] fp32, pages [P,B,G,d],
    slots [N] int32, sum [NB,G,d] fp32, count [NB] int32, kmin and kmax [NB,sub,G,d] fp32,
    block_of_page [P] int32; any strides. Runs on the current stream of their device.
    """
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    pages, page_size = k_pages.shape[:2]
    half = head_dim // 2
    sections = (half, 0) if mrope_section is None else mrope_section
    table = next((t for t in (sum, count, kmin) if t is not None), None)
    if table is None:
        block_of_page = None
    parts = 1 if kmin is None else kmin.shape[1]
    frequencies = triton.next_power_of_2(half)
    tile, heads, warps = _rotate_config(frequencies, q.element_size())
    groups = triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads)
    if tokens == 0 or groups == 0:
        return

    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        rows = key_offsets = None
        if block_of_page is not None:
            rows = torch.empty(tokens, dtype=torch.int32, device=q.device)
            key_offsets = torch.empty(tokens, dtype=torch.int64, device=q.device)
        _rotate_kernel[(triton.cdiv(tokens, tile) * groups,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            positions_ptr=positions,
            inv_freq_ptr=inv_freq,
            slots_ptr=slots,
            q_out_ptr=q_out,
            k_pages_ptr=k_pages,
            v_pages_ptr=v_pages,
            raw_k_pages_ptr=raw_k_pages,
            block_of_page_ptr=block_of_page,
            rows_ptr=rows,
            key_offsets_ptr=key_offsets,
            tokens=tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
            height_from=sections[0],
            width_from=sections[0] + sections[1],
            page_size=page_size,
            slot_count=pages * page_size,
            blocks=0 if table is None else table.shape[0],
            parts=parts,
            **_strides(q, "q", "nhd"),
            **_strides(k, "k", "nhd"),
            **_strides(v, "v", "nhd"),
            **_strides(positions, "positions", "an"),
            **_strides(inv_freq, "inv_freq", "f"),
            **_strides(slots, "slots", "n"),
            **_strides(q_out, "q_out", "nhd"),
            **_strides(k_pages, "k_pages", "pbhd"),
            **_strides(v_pages, "v_pages", "pbhd"),
            **_strides(raw_k_pages, "raw_k_pages", "pbhd"),
            **_strides(block_of_page, "block_of_page", "p"),
            SUMMARY_RAW=summary_raw,
            HALF=half,
            FREQUENCIES=frequencies,
            TOKENS=tile,
            HEADS=heads,
            num_warps=warps,
        )
        if block_of_page is None:
            return
        keys = k if summary_raw else k_pages
        channels = min(32, triton.next_power_of_2(head_dim))
        grid = (triton.cdiv(tokens, 32), kv_heads * parts, triton.cdiv(head_dim, channels))
        _summary_kernel[grid](
            keys_ptr=keys,
            rows_ptr=rows,
            key_offsets_ptr=key_offsets,
            sum_ptr=sum,
            count_ptr=count,
            kmin_ptr=kmin,
            kmax_ptr=kmax,
            tokens=tokens,
            parts=parts,
            keys_stride_h=keys.stride(-2),
            keys_stride_d=keys.stride(-1),
            **_strides(sum, "sum", "bhd"),
            **_strides(count, "count", "b"),
            **_strides(kmin, "kmin", "bshd"),
            **_strides(kmax, "kmax", "bshd"),
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            TILE=32,
            SCAN=256,
            UNROLL=32,
            num_warps=1,
        )
