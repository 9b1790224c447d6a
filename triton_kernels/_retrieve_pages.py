"""retrieve: the pages of the chosen blocks between sinks and recent pages, each once."""

import triton
import triton.language as tl


@triton.jit
def _page_at(
    i,
    index_ptr,
    pages_ptr,
    sinks_ptr,
    recent_ptr,
    sinks,
    chosen,
    recent,
    blocks,
    width,
    index_stride_k,
    pages_stride_n,
    pages_stride_m,
    sinks_stride,
    recent_stride,
):
    """The page at place i of the list (sinks, blocks, recent), -1 for none, and its priority: a
    page that stands twice stays as a sink, else as recent, else in its first block."""
    of_blocks = chosen * width
    j = i - sinks
    in_blocks = (j >= 0) & (j < of_blocks)
    at = index_ptr + (j // width).to(tl.int64) * index_stride_k
    block = tl.load(at, mask=in_blocks, other=-1)
    there = in_blocks & (block >= 0) & (block < blocks)
    at = pages_ptr + block.to(tl.int64) * pages_stride_n
    page = tl.load(at + (j % width).to(tl.int64) * pages_stride_m, mask=there, other=-1)
    priority = sinks + recent + j
    if sinks_ptr is not None:
        at = sinks_ptr + i.to(tl.int64) * sinks_stride
        page = tl.where(i < sinks, tl.load(at, mask=i < sinks, other=-1), page)
    priority = tl.where(i < sinks, i, priority)
    k = j - of_blocks
    if recent_ptr is not None:
        at = recent_ptr + k.to(tl.int64) * recent_stride
        known = (k >= 0) & (k < recent)
        page = tl.where(known, tl.load(at, mask=known, other=-1), page)
    priority = tl.where(k >= 0, sinks + k, priority)
    return page, priority


@triton.jit(
    do_not_specialize=[
        "heads", "length", "tiles", "sinks", "chosen", "recent", "blocks", "width",
        # Lengths of rows, which grow with the history and differ from choice to choice.
        "index_stride_s", "index_stride_r", "pages_stride_s", "sinks_stride_s", "recent_stride_s",
    ],
    # Views of tables whose first row moves on.
    do_not_specialize_on_alignment=["index_ptr", "pages_ptr", "sinks_ptr", "recent_ptr"],
)  # fmt: skip
def pages_kernel(
    index_ptr,
    pages_ptr,
    sinks_ptr,
    recent_ptr,
    values_ptr,  # [S, R, L] int32: the page, or -1 where nothing is to be listed
    listed_ptr,  # [S, R, tiles] int32
    heads,
    length,
    tiles,
    sinks,
    chosen,
    recent,
    blocks,
    width,
    index_stride_s,
    index_stride_r,
    index_stride_k,
    pages_stride_s,
    pages_stride_n,
    pages_stride_m,
    sinks_stride_s,
    sinks_stride_m,
    recent_stride_s,
    recent_stride_m,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: TILE places of a row's list. What bounds it: arithmetic, L comparisons a place;
    the tables stay in cache."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    s = row // heads
    index_ptr += s * index_stride_s + row % heads * index_stride_r
    pages_ptr += s * pages_stride_s
    if sinks_ptr is not None:
        sinks_ptr += s * sinks_stride_s
    if recent_ptr is not None:
        recent_ptr += s * recent_stride_s

    i = tile * TILE + tl.arange(0, TILE)
    page, priority = _page_at(
        i, index_ptr, pages_ptr, sinks_ptr, recent_ptr, sinks, chosen, recent, blocks, width,
        index_stride_k, pages_stride_n, pages_stride_m, sinks_stride_m, recent_stride_m,
    )  # fmt: skip
    same_before = tl.zeros((TILE, OTHERS), tl.int32)  # summed once: over threads it takes steps
    for start in range(0, length, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other, before = _page_at(
            j, index_ptr, pages_ptr, sinks_ptr, recent_ptr, sinks, chosen, recent, blocks, width,
            index_stride_k, pages_stride_n, pages_stride_m, sinks_stride_m, recent_stride_m,
        )  # fmt: skip
        same = (other[None, :] == page[:, None]) & (before[None, :] < priority[:, None])
        same &= (j < length)[None, :]
        same_before += same.to(tl.int32)
    repeats = tl.sum(same_before, 1)
    listed = (page >= 0) & (repeats == 0) & (i < length)
    tl.store(values_ptr + row * length + i, tl.where(listed, page, -1), mask=i < length)
    tl.store(listed_ptr + row * tiles + tile, tl.sum(listed.to(tl.int32), 0))
