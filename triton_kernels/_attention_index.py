"""attention: where the visible keys of each table lie, found once a call for all heads and tiles.

A tile of the attention kernels is a run of logical keys, and its pages may be anywhere, partial or
missing. So one small kernel writes, for each table, the slot of every key that some query of the
stream may see, in logical order: the attention kernels load BLOCK_N slots and gather. Sinks and
window stand next to each other in this list; keys hidden between them have no place in it.

What bounds it: latency. It reads the table and the fills and writes 4 bytes a visible key, 1/256 of
the key and value of two heads of 128 in 16 bits. With `page_shift` it also writes the angles of a
page (4 d bytes): no attention tile computes one.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._angles import cos_sin, turns_per_position

# Keys of the granules of the list; the tiles of the attention kernels divide it.
GRANULE = 64
_GRANULE = tl.constexpr(GRANULE)


@triton.jit
def rows_of_stream(cu_seqlens_ptr, s, rows):
    """First query row of stream s and its number of rows, within the rows that there are."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s), 0), rows)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s + 1), 0), rows)
    return start, tl.maximum(stop - start, 0)


@triton.jit
def lowest_key(first_query, last_key, window, window_first):
    """The first key up to last_key that a query at first_query or later sees beside the sinks;
    last_key + 1 where there is none."""
    low = tl.maximum(window_first, 0)
    if window is not None:
        low = tl.maximum(low, first_query - window + 1)
        low = tl.where(window == 0, last_key + 1, low)
    return tl.minimum(low, last_key + 1)


@triton.jit
def listed_range(total, queries, sink_tokens, window, window_first):
    """The list of a stream's visible keys: how many stand before the gap (whole granules of sinks),
    how many keys are left out there, and the list's length in granules."""
    sinks = tl.cdiv(tl.minimum(sink_tokens, total), _GRANULE)
    low = lowest_key(total - queries, total - 1, window, window_first) // _GRANULE
    low = tl.maximum(low, sinks)
    length = sinks + tl.maximum(tl.cdiv(total, _GRANULE) - low, 0)
    return sinks * _GRANULE, (low - sinks) * _GRANULE, length


@triton.jit
def _entries(table_ptr, stride_l, page_fill_ptr, e, length, pages, PAGE_SIZE: tl.constexpr):
    """Pages of the table's entries e and how many tokens each contributes."""
    page = tl.load(table_ptr + e.to(tl.int64) * stride_l, mask=e < length, other=-1)
    listed = (page >= 0) & (page < pages)
    fill = tl.where(listed, PAGE_SIZE, 0)
    if page_fill_ptr is not None:
        fill = tl.minimum(tl.maximum(tl.load(page_fill_ptr + page, mask=listed, other=0), 0), fill)
    return page, fill


@triton.jit(
    do_not_specialize=[
        "per_stream",
        "length",
        "pages",
        "rows",
        "sink_tokens",
        "window",
        "angle_rows",
        "height_from",
        "width_from",
        # Products of the table's length, which grows with a stream.
        "table_stride_s",
        "table_stride_x",
        "shift_stride_s",
        "shift_stride_x",
    ],
    do_not_specialize_on_alignment=["table_ptr"],  # may be a view that moves on
)
def index_kernel(
    table_ptr,
    page_fill_ptr,  # exactly one of the two is not None
    kv_len_ptr,
    cu_seqlens_ptr,
    window_start_ptr,
    shift_ptr,  # None: pages stand where they were written
    inv_freq_ptr,
    totals_ptr,  # out, [tables] int32: logical keys
    slots_ptr,  # out, [tables, capacity]: page * PAGE_SIZE + offset of each listed key
    turns_ptr,  # out, [tables, capacity] int32: its row of angles; only with a shift
    angles_ptr,  # out, [tables, angle_rows, 2, HALF] fp32: cos and sin; only with a shift
    per_stream,
    length,
    pages,
    rows,
    sink_tokens,
    window,
    capacity,
    angle_rows,  # one for each entry; below `length` only for those with listed keys
    height_from,  # frequencies below turn with t, then with h, then with w
    width_from,
    table_stride_s,
    table_stride_x,
    table_stride_l,
    shift_stride_s,
    shift_stride_x,
    shift_stride_l,
    shift_stride_a,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: ENTRIES entries of one table.

    Each program sums the fills of the whole table itself: a table of SCAN entries is one load, and
    the alternative is a launch more.
    """
    blocks = tl.cdiv(length, ENTRIES)
    table = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ENTRIES
    s = table // per_stream
    x = table % per_stream
    table_ptr += s.to(tl.int64) * table_stride_s + x.to(tl.int64) * table_stride_x

    # The compiler keeps loads in order: these are on their way while the table is read.
    from_row, queries = rows_of_stream(cu_seqlens_ptr, s, rows)
    most = length * PAGE_SIZE
    if kv_len_ptr is not None:
        most = tl.maximum(tl.load(kv_len_ptr + s), 0)
    window_first = 0
    if window_start_ptr is not None:
        window_first = tl.load(window_start_ptr + s)

    before = 0
    total = 0
    for scan in range(0, length, SCAN):
        e = scan + tl.arange(0, SCAN)
        _, fill = _entries(table_ptr, table_stride_l, page_fill_ptr, e, length, pages, PAGE_SIZE)
        total += tl.sum(fill, 0)
        before += tl.sum(tl.where(e < first, fill, 0), 0)
    total = tl.minimum(total, most)
    if first == 0:
        tl.store(totals_ptr + table, total)
    if queries == 0:
        return
    sinks, hidden, _ = listed_range(total, queries, sink_tokens, window, window_first)

    e = first + tl.arange(0, ENTRIES)
    page, fill = _entries(table_ptr, table_stride_l, page_fill_ptr, e, length, pages, PAGE_SIZE)
    start = before + tl.cumsum(fill, 0) - fill
    stop = tl.minimum(start + fill, total)
    list_at = table.to(tl.int64) * capacity
    # An entry's row of angles: its own number, or the place of its first listed key, of which there
    # are not more than the window holds.
    first_key = tl.where(start < sinks, start, tl.maximum(start, sinks + hidden))
    row = tl.where(first_key < sinks, first_key, first_key - hidden)
    row = tl.where(angle_rows < length, row, e)
    for from_offset in range(0, PAGE_SIZE, SLOTS):
        offset = from_offset + tl.arange(0, SLOTS)[None, :]
        j = start[:, None] + offset
        listed = (j < stop[:, None]) & ((j < sinks) | (j >= sinks + hidden))
        place = tl.where(j < sinks, j, j - hidden)
        listed &= place < capacity
        slot = page[:, None].to(slots_ptr.dtype.element_ty) * PAGE_SIZE + offset
        tl.store(slots_ptr + list_at + place, slot, mask=listed)
        if shift_ptr is not None:
            turn = tl.broadcast_to(row[:, None], (ENTRIES, SLOTS))
            tl.store(turns_ptr + list_at + place, turn, mask=listed)

    if shift_ptr is not None:
        shift_ptr += s.to(tl.int64) * shift_stride_s + x.to(tl.int64) * shift_stride_x
        shifts = shift_ptr + e.to(tl.int64) * shift_stride_l
        listed = (start < stop) & ((start < sinks) | (stop > sinks + hidden))
        time = tl.load(shifts, mask=listed, other=0)
        height = tl.load(shifts + shift_stride_a, mask=listed, other=0)
        width = tl.load(shifts + 2 * shift_stride_a, mask=listed, other=0)
        f = tl.arange(0, FREQUENCIES)
        positions = tl.where(
            (f < height_from)[None, :],
            time[:, None],
            tl.where((f < width_from)[None, :], height[:, None], width[:, None]),
        )
        inv_freq = tl.load(inv_freq_ptr + f, mask=f < HALF, other=0.0)
        cos, sin = cos_sin(positions, turns_per_position(inv_freq)[None, :])
        listed &= row < angle_rows
        row = table.to(tl.int64) * angle_rows + row
        at = angles_ptr + row[:, None] * (2 * HALF) + f[None, :]
        mask = listed[:, None] & (f < HALF)[None, :]
        tl.store(at, cos, mask=mask)
        tl.store(at + HALF, sin, mask=mask)
