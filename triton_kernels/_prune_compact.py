"""prune: kept tokens and their positions in order, the padding, and the state for the next call."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._compact import counts_around, wide
from vicostream_kernels.triton_kernels._prune_layout import segment_of, step_stride


@triton.jit(
    do_not_specialize=[
        "segments",
        "steps",
        "places",
        "tiles",
        "blocks",
        "capacity",
        "share",
        # By the number of tokens, or between steps: a short chunk would be compiled for anew.
        "positions_stride_a",
        "positions_stride_t",
        "out_positions_stride_a",
        "kept_stride_t",
    ]
)
def compact_kernel(
    x_ptr,
    positions_ptr,
    kept_ptr,
    counts_ptr,  # [blocks] int32
    tokens_ptr,
    out_positions_ptr,
    index_ptr,
    cu_count_ptr,
    seen_steps_ptr,  # [S] int32 or None: no state
    previous_ptr,
    last_kept_ptr,
    mean_count_ptr,
    step_counts_ptr,  # [steps] int32 beside mean_count: whole tokens of each step
    table_ptr,
    segments,
    steps,
    places,
    tiles,
    blocks,
    capacity,
    share,  # rows of padding that each program looks after
    width,
    x_stride_t,
    x_stride_n,
    x_stride_d,
    positions_stride_a,
    positions_stride_t,
    positions_stride_n,
    kept_stride_t,
    kept_stride_n,
    tokens_stride_c,
    out_positions_stride_a,
    previous_stride_s,
    previous_stride_n,
    last_kept_stride_s,
    last_kept_stride_n,
    BY_STEP: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One program: ROWS tokens of a segment, and `share` rows of the padding.

    Nothing of a state is read by a launch that writes it, but for a count by its only program.
    What bounds it: memory. Kept rows are read and written once, padding is written.
    """
    program = tl.program_id(0)
    s = (program // tiles).to(tl.int64)
    tile = program % tiles
    steps, places, start, first_step, first_block = segment_of(table_ptr, s, steps, places, BLOCK)
    size = steps * places
    # Tokens kept before this tile: of the blocks before its own, and in that.
    block = tile * ROWS // BLOCK
    before, total = counts_around(counts_ptr, first_block + block, blocks, SCAN)
    kept_t = step_stride(places, kept_stride_t, kept_stride_n, PACKED)
    kept_ptr += wide(start) * kept_stride_n
    local = tile * ROWS + tl.arange(0, ROWS)
    there = local < size
    t = local // places
    n = (local % places).to(tl.int64)
    beside = block * BLOCK + tl.arange(0, BLOCK)
    at = (beside // places).to(tl.int64) * kept_t + (beside % places).to(tl.int64) * kept_stride_n
    stays = (tl.load(kept_ptr + at, mask=beside < size, other=0) != 0)[None, :]
    ahead = tl.sum((stays & (beside[None, :] < local[:, None])).to(tl.int32), 1)
    at = t.to(tl.int64) * kept_t + n * kept_stride_n
    keep = tl.load(kept_ptr + at, mask=there, other=0) != 0
    slot = before + ahead
    listed = keep & (slot < capacity)

    tl.store(index_ptr + slot, (start + local).to(tl.int32), mask=listed)
    positions_t = step_stride(places, positions_stride_t, positions_stride_n, PACKED)
    at = wide(start) * positions_stride_n + t.to(tl.int64) * positions_t + n * positions_stride_n
    for axis in tl.static_range(3):
        value = tl.load(positions_ptr + axis * positions_stride_a + at, mask=listed, other=0)
        tl.store(out_positions_ptr + axis * out_positions_stride_a + slot, value, mask=listed)

    last = there & (t == steps - 1)
    newest = keep
    wanted = listed
    if previous_ptr is not None:
        wanted |= last
    if last_kept_ptr is not None:
        for later in range(1, steps):
            then = wide(later) * kept_t + n * kept_stride_n
            again = tl.load(kept_ptr + then, mask=there & (t < later), other=0)
            newest &= again == 0
        wanted |= newest
    stride_t = step_stride(places, x_stride_t, x_stride_n, PACKED)
    rows = wide(start) * x_stride_n + t.to(tl.int64) * stride_t + n * x_stride_n
    for begin in range(0, width, CHUNK):
        c = begin + tl.arange(0, CHUNK)
        inside = (c < width)[None, :]
        d = c.to(tl.int64)[None, :]
        source = rows[:, None] + d * x_stride_d
        row = tl.load(x_ptr + source, mask=wanted[:, None] & inside, other=0.0)
        target = slot.to(tl.int64)[:, None] * tokens_stride_c + d
        tl.store(tokens_ptr + target, row, mask=listed[:, None] & inside)
        if previous_ptr is not None:
            target = s * previous_stride_s + n[:, None] * previous_stride_n + d
            tl.store(previous_ptr + target, row, mask=last[:, None] & inside)
        if last_kept_ptr is not None:
            target = s * last_kept_stride_s + n[:, None] * last_kept_stride_n + d
            tl.store(last_kept_ptr + target, row, mask=newest[:, None] & inside)

    if tile == 0:
        upto, _ = counts_around(counts_ptr, first_block + tl.cdiv(size, BLOCK), blocks, SCAN)
        tl.store(cu_count_ptr + s + 1, upto)
        if program == 0:
            tl.store(cu_count_ptr, 0)
        if seen_steps_ptr is not None:
            tl.store(seen_steps_ptr + s, tl.load(seen_steps_ptr + s) + steps)
        if mean_count_ptr is not None:
            known = 0
            for step in range(0, steps):
                is_known = tl.load(step_counts_ptr + first_step + step) > 0
                if BY_STEP:
                    known += is_known.to(tl.int32)
                else:
                    known = tl.maximum(known, is_known.to(tl.int32))
            tl.store(mean_count_ptr + s, tl.load(mean_count_ptr + s) + known)

    stop = tl.minimum((program + 1) * share, capacity)
    for empty in range(tl.maximum(program * share, total), stop):
        tl.store(index_ptr + empty, -1)
        for axis in tl.static_range(3):
            tl.store(out_positions_ptr + axis * out_positions_stride_a + empty, 0)
        for begin in range(0, width, CHUNK):
            c = begin + tl.arange(0, CHUNK)
            zero = tl.zeros((CHUNK,), tokens_ptr.dtype.element_ty)
            tl.store(tokens_ptr + wide(empty) * tokens_stride_c + c, zero, mask=c < width)
