"""Order-preserving compaction on the device: what select_changed, select_pages and prune share.

Rows of entries are cut into tiles. The launch that decides leaves the number of kept entries of
each tile; the launch that lists adds up those before its own tile. No atomics, no host.
"""

import triton
import triton.language as tl

#: Entries of a tile.
TILE = 64


@triton.jit
def wide(n):
    """A number as int64. Loop variables are plain numbers in the interpreter, without methods."""
    return tl.full((), 0, tl.int64) + n


@triton.jit
def counts_around(counts_ptr, own, tiles, SIZE: tl.constexpr):
    """How many entries stand before tile `own` of a row, and in all of its tiles."""
    before = tl.zeros((SIZE,), tl.int32)
    total = tl.zeros((SIZE,), tl.int32)
    for start in range(0, tiles, SIZE):
        i = start + tl.arange(0, SIZE)
        count = tl.load(counts_ptr + i, mask=i < tiles, other=0)
        before += tl.where(i < own, count, 0)
        total += count
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit(do_not_specialize=["length", "tiles", "capacity"])
def list_kernel(
    values_ptr,  # [rows, length] int32: what to list, -1 for nothing
    listed_ptr,  # [rows, tiles] int32: how many of a tile are listed
    changed_ptr,  # [rows, tiles] int32 or None: summed into count
    out_ptr,  # [rows, capacity] int32
    count_ptr,  # [rows] int32 or None
    length,
    tiles,
    capacity,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: the listed values of a tile at their place, and -1 where the padding begins.

    What bounds it: latency. It reads 4 bytes an entry and the counts of its row.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = tile * TILE + tl.arange(0, TILE)
    value = tl.load(values_ptr + row * length + i, mask=i < length, other=-1)
    listed = value >= 0
    before, total = counts_around(listed_ptr + row * tiles, tile, tiles, SCAN)
    slot = before + tl.cumsum(listed.to(tl.int32), 0) - 1
    out_ptr += row * capacity
    tl.store(out_ptr + slot, value, mask=listed & (slot < capacity))
    tl.store(out_ptr + i, -1, mask=(i >= total) & (i < capacity))
    if count_ptr is not None:
        if tile == 0:
            _, count = counts_around(changed_ptr + row * tiles, tile, tiles, SCAN)
            tl.store(count_ptr + row, count)
