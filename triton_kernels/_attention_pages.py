"""attention: one tile of keys that lie in pages, folded into the rows' states."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._attention_tile import (
    fold_tile,
    load_head,
    load_rotated,
    scores_of,
)


@triton.jit
def fold_page_tile(
    acc_a,
    acc_b,
    top,
    total,
    q_a,
    q_b,
    start,  # first key of the tile, a multiple of BLOCK_N
    rule,  # who sees what: see below
    window,  # or None, which Triton 3.3 takes in no tuple
    pages,  # where the keys lie
    turns_ptr,  # of the table's slots; None without a shift
    angles_ptr,
    scale,
    MASKED: tl.constexpr,  # False: every row sees every key of the tile
    WINDOWED: tl.constexpr,  # some key may be hidden behind the window
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A key that no row sees is not read, so what its slot holds can't reach the output.

    rule: i [M], the logical position of each row's query; last_key and low, so that rows see keys
    up to last_key only, the sinks and from low; sink_tokens; the window's first key. pages:
    pointers to K and V of the KV head and to the table's slots; sinks and hidden, as listed_range
    gives them; strides of K and V.
    """
    i, last_key, low, sink_tokens, window_first = rule
    k_ptr, v_ptr, slots_ptr, sinks, hidden, k_strides, v_strides = pages
    j = start + tl.arange(0, BLOCK_N)
    live = None
    place = start
    if MASKED:
        live = j <= last_key
    if WINDOWED:
        place = tl.where(start < sinks, start, start - hidden)
        if MASKED:
            live = live & ((j < sink_tokens) | (j >= low))
    places = place + tl.arange(0, BLOCK_N)
    if MASKED:
        slot = tl.load(slots_ptr + places, mask=live, other=0)
    else:
        slot = tl.load(slots_ptr + places)
    page = (slot // PAGE_SIZE).to(tl.int64)
    offset = (slot % PAGE_SIZE).to(tl.int64)

    k_rows = k_ptr + page * k_strides[0] + offset * k_strides[1]
    v_rows = v_ptr + page * v_strides[0] + offset * v_strides[1]
    if angles_ptr is None:
        k_a, k_b = load_head(k_rows, live, k_strides[2], HEAD_DIM, SPLIT, PART_A, PART_B)
    else:
        if MASKED:
            entry = tl.load(turns_ptr + places, mask=live, other=0)
        else:
            entry = tl.load(turns_ptr + places)
        angles = angles_ptr + entry.to(tl.int64) * HEAD_DIM
        k_a, k_b = load_rotated(k_rows, live, k_strides[2], angles, HEAD_DIM, SPLIT, PART_A)
    v_a, v_b = load_head(v_rows, live, v_strides[2], HEAD_DIM, SPLIT, PART_A, PART_B)

    scores = scores_of(q_a, q_b, k_a, k_b, PART_B)
    if MASKED:
        seen = j[None, :] <= i[:, None]
        if WINDOWED:
            recent = (j >= window_first)[None, :]
            if window is not None:
                recent = recent & (j[None, :] > i[:, None] - window)
            seen = seen & (recent | (j < sink_tokens)[None, :])
        scores = tl.where(seen, scores, -float("inf"))
    return fold_tile(acc_a, acc_b, top, total, scores, scale, v_a, v_b, PART_B)
