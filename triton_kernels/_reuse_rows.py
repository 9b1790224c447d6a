"""reuse: taking listed rows out of frames, and putting rows back among those of a base."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["places", "rows", "tiles"])
def gather_kernel(
    x_ptr,
    index_ptr,
    out_ptr,  # [F, K, C]
    places,
    rows,
    width,
    tiles,
    x_stride_f,
    x_stride_n,
    x_stride_c,
    index_stride_f,
    index_stride_k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS listed rows of a frame.

    What bounds it: memory, each listed row read once and written once.
    """
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    listed = k < rows
    k = k.to(tl.int64)
    row = tl.load(index_ptr + frame * index_stride_f + k * index_stride_k, mask=listed, other=-1)
    there = (row >= 0) & (row < places)
    sources = x_ptr + frame * x_stride_f + row.to(tl.int64) * x_stride_n
    targets = out_ptr + (frame * rows + k) * width
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = (c < width)[None, :]
        wide = c.to(tl.int64)[None, :]
        values = tl.load(
            sources[:, None] + wide * x_stride_c, mask=there[:, None] & inside, other=0.0
        )
        tl.store(targets[:, None] + wide, values, mask=listed[:, None] & inside)


@triton.jit(do_not_specialize=["frames", "places", "replaced"])
def merge_kernel(
    base_ptr,
    rows_ptr,
    index_ptr,
    residual_ptr,
    out_ptr,  # [F, N, C]
    frames,
    places,
    replaced,
    width,
    base_stride_f,
    base_stride_n,
    base_stride_c,
    rows_stride_f,
    rows_stride_k,
    rows_stride_c,
    index_stride_f,
    index_stride_k,
    residual_stride_f,
    residual_stride_n,
    residual_stride_c,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: ROWS rows of a frame, each from the base or from the list, whichever it is.

    Which row replaces which place is found by looking through the frame's list: 4 bytes an entry
    from cache for ROWS rows, against a launch and a table. The frames of a place are neighbours,
    so that a shared base is read once from memory.

    What bounds it: memory. Of base and rows it reads only what it writes, F N C elements in all,
    as many of the residual, and writes as many.
    """
    frame = (tl.program_id(0) % frames).to(tl.int64)
    n = tl.program_id(0) // frames * ROWS + tl.arange(0, ROWS)
    inside = n < places
    index_ptr += frame * index_stride_f
    source = tl.full((ROWS,), -1, tl.int32)
    for start in range(0, replaced, SCAN):
        k = start + tl.arange(0, SCAN)
        at = tl.load(index_ptr + k.to(tl.int64) * index_stride_k, mask=k < replaced, other=-1)
        found = tl.where(at[None, :] == n[:, None], k[None, :], -1)
        source = tl.maximum(source, tl.max(found, 1))
    is_replaced = source >= 0

    n = n.to(tl.int64)
    bases = base_ptr + frame * base_stride_f + n * base_stride_n
    rows = rows_ptr + frame * rows_stride_f + source.to(tl.int64) * rows_stride_k
    residuals = residual_ptr
    if residual_ptr is not None:
        residuals = residual_ptr + frame * residual_stride_f + n * residual_stride_n
    targets = out_ptr + (frame * places + n) * width
    from_base = (inside & (is_replaced == 0))[:, None]
    from_rows = (inside & is_replaced)[:, None]
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        in_row = (c < width)[None, :]
        wide = c.to(tl.int64)[None, :]
        kept = tl.load(bases[:, None] + wide * base_stride_c, mask=from_base & in_row, other=0.0)
        new = tl.load(rows[:, None] + wide * rows_stride_c, mask=from_rows & in_row, other=0.0)
        value = tl.where(is_replaced[:, None], new, kept)
        if residual_ptr is not None:
            added = tl.load(
                residuals[:, None] + wide * residual_stride_c,
                mask=inside[:, None] & in_row,
                other=0.0,
            )
            value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(targets[:, None] + wide, value, mask=inside[:, None] & in_row)
