"""reuse: how alike rows are, and which of a frame changed."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._similarity import comes_before, cosine_of, low_value


@triton.jit(do_not_specialize=["frames", "places"])
def similarity_kernel(
    feature_ptr,
    reference_ptr,
    similarity_ptr,  # [F, N] float32
    frames,
    places,
    width,
    feature_stride_f,
    feature_stride_n,
    feature_stride_c,
    reference_stride_f,
    reference_stride_n,
    reference_stride_c,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,  # no tile goes beyond the width
):
    """One program: ROWS rows of a frame. The frames of a place are neighbours, so that a shared
    reference is read once from memory.

    What bounds it: memory, (F + 1) N C elements read for F N results.
    """
    frame = (tl.program_id(0) % frames).to(tl.int64)
    n = tl.program_id(0) // frames * ROWS + tl.arange(0, ROWS)
    known = n < places
    # Rows that are not there read another's: what a mask keeps from the loads costs them time.
    row = tl.minimum(n, places - 1).to(tl.int64)[:, None]
    features = feature_ptr + frame * feature_stride_f + row * feature_stride_n
    references = reference_ptr + frame * reference_stride_f + row * reference_stride_n

    total = tl.zeros((ROWS, CHUNK), tl.float32)
    a_squares = tl.zeros((ROWS, CHUNK), tl.float32)
    b_squares = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in range(0, width, CHUNK * UNROLL):
        # All loads stand before the first use of one.
        of_feature = ()
        of_reference = ()
        for u in tl.static_range(UNROLL):
            c = (start + u * CHUNK + tl.arange(0, CHUNK))[None, :]
            inside = c < width
            c = c.to(tl.int64)
            if EVEN:
                a = tl.load(features + c * feature_stride_c)
                b = tl.load(references + c * reference_stride_c)
            else:
                a = tl.load(features + c * feature_stride_c, mask=inside, other=0.0)
                b = tl.load(references + c * reference_stride_c, mask=inside, other=0.0)
            of_feature = of_feature + (a,)
            of_reference = of_reference + (b,)
        for u in tl.static_range(UNROLL):
            a = of_feature[u].to(tl.float32)
            b = of_reference[u].to(tl.float32)
            # By fma in so many words: were one of the sums fused and not the other, equal vectors
            # would not have exactly 1.
            if METRIC == "l1":
                total += tl.abs(a - b)
            elif METRIC == "l2":
                total = tl.fma(a - b, a - b, total)
            else:
                total = tl.fma(a, b, total)
            if METRIC == "cosine":
                a_squares = tl.fma(a, a, a_squares)
                b_squares = tl.fma(b, b, b_squares)
    result = tl.sum(total, 1)
    channels = tl.full((ROWS,), 1, tl.float32) * width
    if METRIC == "l1":
        result = -tl.div_rn(result, channels)
    elif METRIC == "l2":
        result = -tl.sqrt_rn(tl.div_rn(result, channels))
    elif METRIC == "cosine":
        result = cosine_of(result, tl.sum(a_squares, 1), tl.sum(b_squares, 1))
    tl.store(similarity_ptr + frame * places + n.to(tl.int64), result, mask=known)


@triton.jit
def _ranked(similarity_ptr, force_ptr, n, places, force_stride_n):
    """Of the rows n: the value and the number to rank by. Forced rows come first, those that are
    not there last."""
    value = low_value(tl.load(similarity_ptr + n, mask=n < places, other=float("inf")))
    number = n
    if force_ptr is not None:
        forced = tl.load(force_ptr + n.to(tl.int64) * force_stride_n, mask=n < places, other=0)
        value = tl.where(forced != 0, float("-inf"), value)
        number = tl.where(forced != 0, n - 0x40000000, n)
    return value, number


@triton.jit(do_not_specialize=["places", "tiles", "k", "capacity"])
def rank_kernel(
    similarity_ptr,  # [F, N] float32
    force_ptr,  # [F, N] or [N] uint8, or None
    values_ptr,  # [F, N] int32
    listed_ptr,  # [F, tiles] int32
    changed_ptr,  # [F, tiles] int32
    places,
    tiles,
    k,
    capacity,
    threshold,
    force_stride_f,
    force_stride_n,
    HAS_THRESHOLD: tl.constexpr,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: the ranks of TILE rows of a frame, by counting the rows that come before.

    What bounds it: arithmetic, N comparisons a row; similarities stay in cache. For a few thousand
    rows that is shorter than the steps of a sort.
    """
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    similarity_ptr += frame * places
    if force_ptr is not None:
        force_ptr += frame * force_stride_f
    n = tile * TILE + tl.arange(0, TILE)
    inside = n < places
    value, number = _ranked(similarity_ptr, force_ptr, n, places, force_stride_n)

    ahead = tl.zeros((TILE, OTHERS), tl.int32)  # summed once: a sum over threads takes steps
    for start in range(0, places, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_value, other_number = _ranked(
            similarity_ptr, force_ptr, other, places, force_stride_n
        )
        before = comes_before(
            other_value[None, :], other_number[None, :], value[:, None], number[:, None]
        )
        ahead += before.to(tl.int32)
    rank = tl.sum(ahead, 1)

    changed = (rank < k) | (number < 0)
    if HAS_THRESHOLD:
        # Written as what is alike, so that NaN changed.
        alike = tl.load(similarity_ptr + n, mask=inside, other=0.0)
        changed |= (alike >= threshold) == 0
    changed &= inside
    listed = changed & (rank < capacity)
    tl.store(values_ptr + frame * places + n, tl.where(listed, n, -1), mask=inside)
    tl.store(listed_ptr + frame * tiles + tile, tl.sum(listed.to(tl.int32), 0))
    tl.store(changed_ptr + frame * tiles + tile, tl.sum(changed.to(tl.int32), 0))
