"""prune: the score of each token, and what is known of it before the decision."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._compact import wide
from vicostream_kernels.triton_kernels._prune_layout import segment_of, step_stride
from vicostream_kernels.triton_kernels._prune_means import inverse_norm
from vicostream_kernels.triton_kernels._similarity import cosine_of

# Marks of a token: of a step that is kept whole, holds NaN or inf, masked in, masked out.
FIRST = tl.constexpr(1)
BROKEN = tl.constexpr(2)
MASKED_IN = tl.constexpr(4)
MASKED_OUT = tl.constexpr(8)
MUST = tl.constexpr(7)


@triton.jit
def passes(score, threshold, KEEP: tl.constexpr):
    """What a threshold keeps; written as what it does not drop, so that NaN is kept."""
    if KEEP == "below":
        dropped = score >= threshold
    elif KEEP == "at_most":
        dropped = score > threshold
    elif KEEP == "above":
        dropped = score <= threshold
    else:
        dropped = score < threshold
    return dropped == 0


@triton.jit
def _tiles(
    x_ptr, state_ptr, mean_ptr, step, at_x, at_state, at_mean, begin, width, x_stride_d,
    REFERENCE: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """UNROLL tiles of rows as they are stored, from channel `begin` on: of the tokens ("none"), of
    a mean, else of the step of each row, of the state before it; of any step where there is no
    state, as a row without a reference has no score."""
    # All loads stand before the first use of one, and none is converted before its use.
    tiles = ()
    for u in tl.static_range(UNROLL):
        c = begin + u * CHUNK + tl.arange(0, CHUNK)
        in_row = (c < width)[None, :]
        if EVEN:
            in_row = tl.full((1, CHUNK), True, tl.int1)
        d = c.to(tl.int64)[None, :]
        if (REFERENCE == "frame_mean") | (REFERENCE == "running_mean"):
            tile = tl.load(mean_ptr + at_mean + c[None, :], mask=in_row, other=0.0)
        elif (REFERENCE != "none") & (state_ptr is not None):
            here = (step >= 0)[:, None]
            at = at_x[:, None] + d * x_stride_d
            tile = tl.load(x_ptr + at, mask=in_row & here, other=0.0)
            at = at_state[:, None] + d
            before = tl.load(state_ptr + at, mask=in_row & (here == 0), other=0.0)
            tile = tl.where(here, tile, before)
        elif EVEN:
            tile = tl.load(x_ptr + at_x[:, None] + d * x_stride_d)
        else:
            tile = tl.load(x_ptr + at_x[:, None] + d * x_stride_d, mask=in_row, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _shown(channels_ptr, begin, width, CHUNK: tl.constexpr, UNROLL: tl.constexpr):
    """Which channels of UNROLL tiles are compared."""
    tiles = ()
    for u in tl.static_range(UNROLL):
        c = begin + u * CHUNK + tl.arange(0, CHUNK)
        tiles = tiles + ((tl.load(channels_ptr + c, mask=c < width, other=0) != 0)[None, :],)
    return tiles


@triton.jit
def _add(first, second, token, other, METRIC: tl.constexpr):
    """The sums of a metric after some more channels.

    Products are added by fma in so many words, as those of `squares` are: a compiler that fuses
    one of the sums and not the other takes equal vectors for unequal.
    """
    if METRIC == "cosine":
        first = tl.fma(token, other, first)
    elif METRIC == "l1":
        first += tl.abs(token - other)
    elif METRIC == "l2":
        first = tl.fma(token - other, token - other, first)
    if (METRIC == "cosine") | (METRIC == "gaussian"):
        second = tl.fma(other, other, second)
    return first, second


@triton.jit
def _metric(first, second, squares, compared, METRIC: tl.constexpr):
    """The metric from its sums; for the gaussian, `first` is the squared distance."""
    if METRIC == "cosine":
        value = cosine_of(first, squares, second)
    elif METRIC == "gaussian":
        value = tl.exp(first * -4.0)
        value += tl.exp(first * -2.0)
        value += tl.exp(first * -1.0)
        value += tl.exp(first * -0.5)
        value += tl.exp(first * -0.25)
    else:
        value = tl.div_rn(first, tl.full(first.shape, 1.0, tl.float32) * compared)
        if METRIC == "l2":
            value = tl.sqrt_rn(value)
    return value


@triton.jit
def _step_of(t, kept, REFERENCE: tl.constexpr):
    """The step of this call that each row is compared with, -1 for what came before it."""
    step = kept
    if REFERENCE == "previous":
        step = tl.zeros_like(kept) + (t - 1)
    elif REFERENCE == "chunk_first":
        step = tl.zeros_like(kept) + tl.where(t > 0, 0, -1)
    return step


@triton.jit(do_not_specialize=["steps", "places", "tiles", "spans", "span"])
def score_kernel(
    x_ptr,
    state0_ptr,  # of each term: [S, L, D] in x's dtype or None
    state1_ptr,
    mean0_ptr,  # of each term: [steps or S, D] float32 or None
    mean1_ptr,
    channels_ptr,  # [S, D] uint8 or None
    external_ptr,  # [M] or None
    mask_ptr,  # [M] uint8 or None
    seen_steps_ptr,  # [S] int32 or None
    score_ptr,  # [M] float32
    marks_ptr,  # [M] uint8
    table_ptr,
    steps,
    places,
    tiles,
    spans,
    span,  # steps of a program
    width,
    compared,  # channels
    weight0,
    weight1,
    external_weight,
    threshold,
    x_stride_t,
    x_stride_n,
    x_stride_d,
    state0_stride_s,
    state0_stride_n,
    state1_stride_s,
    state1_stride_n,
    TERMS: tl.constexpr,
    REFERENCE0: tl.constexpr,
    METRIC0: tl.constexpr,
    REFERENCE1: tl.constexpr,
    METRIC1: tl.constexpr,
    MEAN_BY_CHUNK: tl.constexpr,  # running means are one for each chunk
    ALWAYS: tl.constexpr,
    MASK_OR: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS places, for `span` steps one after another.

    What bounds it: memory where there are many chunks. All steps of a place are in one program
    then, so x comes from memory once, and as the next step's reference from the first-level cache.
    A single chunk is bound by latency, so there each step has its own program, unless what was
    kept decides what comes next ("last_kept").
    """
    s = (tl.program_id(0) // (tiles * spans)).to(tl.int64)
    n = tl.program_id(0) // spans % tiles * ROWS + tl.arange(0, ROWS)
    from_step = tl.program_id(0) % spans * span
    steps, places, start, first_step, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    there = n < places
    # Rows that are not there read another's: what a mask keeps from the loads costs them time.
    far = tl.minimum(n, places - 1).to(tl.int64)
    stride_t = step_stride(places, x_stride_t, x_stride_n, PACKED)
    x_ptr += wide(start) * x_stride_n
    rows = far * x_stride_n
    state0 = s * state0_stride_s + far * state0_stride_n
    state1 = s * state1_stride_s + far * state1_stride_n
    kept = tl.full((ROWS,), -1, tl.int32)

    for t in range(from_step, tl.minimum(from_step + span, steps)):
        i = start + t * places + n
        squares = tl.zeros((ROWS, CHUNK), tl.float32)
        shown_squares = tl.zeros((ROWS, CHUNK), tl.float32)
        first0 = tl.zeros((ROWS, CHUNK), tl.float32)
        second0 = tl.zeros((ROWS, CHUNK), tl.float32)
        first1 = tl.zeros((ROWS, CHUNK), tl.float32)
        second1 = tl.zeros((ROWS, CHUNK), tl.float32)
        step0 = _step_of(t, kept, REFERENCE0)
        step1 = _step_of(t, kept, REFERENCE1)
        row = rows + wide(t) * stride_t
        row0 = rows + tl.maximum(step0, 0).to(tl.int64) * stride_t
        row1 = rows + tl.maximum(step1, 0).to(tl.int64) * stride_t
        by_step = wide(first_step + t) * width
        mean0 = by_step
        mean1 = by_step
        if MEAN_BY_CHUNK:
            if REFERENCE0 == "running_mean":
                mean0 = s * width
            if REFERENCE1 == "running_mean":
                mean1 = s * width
        for begin in range(0, width if TERMS > 0 else 0, CHUNK * UNROLL):
            tokens = _tiles(
                x_ptr, None, None, step0, row, state0, mean0, begin, width, x_stride_d,
                "none", CHUNK, UNROLL, EVEN,
            )  # fmt: skip
            others0 = _tiles(
                x_ptr, state0_ptr, mean0_ptr, step0, row0, state0, mean0, begin, width,
                x_stride_d, REFERENCE0, CHUNK, UNROLL, EVEN,
            )  # fmt: skip
            if TERMS > 1:
                others1 = _tiles(
                    x_ptr, state1_ptr, mean1_ptr, step1, row1, state1, mean1, begin, width,
                    x_stride_d, REFERENCE1, CHUNK, UNROLL, EVEN,
                )  # fmt: skip
            if channels_ptr is not None:
                shown = _shown(channels_ptr + s * width, begin, width, CHUNK, UNROLL)
            for u in tl.static_range(UNROLL):
                token = tokens[u].to(tl.float32)
                squares = tl.fma(token, token, squares)
                if channels_ptr is not None:
                    token = tl.where(shown[u], token, 0.0)
                    shown_squares = tl.fma(token, token, shown_squares)
                other = others0[u].to(tl.float32)
                if channels_ptr is not None:
                    other = tl.where(shown[u], other, 0.0)
                first0, second0 = _add(first0, second0, token, other, METRIC0)
                if TERMS > 1:
                    other = others1[u].to(tl.float32)
                    if channels_ptr is not None:
                        other = tl.where(shown[u], other, 0.0)
                    first1, second1 = _add(first1, second1, token, other, METRIC1)
        all_squares = tl.sum(squares, 1)
        own_squares = all_squares
        if channels_ptr is not None:
            own_squares = tl.sum(shown_squares, 1)
        other0 = tl.sum(second0, 1)
        other1 = tl.sum(second1, 1)

        if (METRIC0 == "gaussian") | (METRIC1 == "gaussian"):
            # Once more, from the cache: distances of normalised vectors need both norms first.
            own_scale = inverse_norm(own_squares)[:, None]
            scale0 = inverse_norm(other0)[:, None]
            scale1 = inverse_norm(other1)[:, None]
            if REFERENCE0 == "frame_mean":  # a mean of normalised tokens, itself not normalised
                scale0 = tl.full((ROWS, 1), 1.0, tl.float32)
            if REFERENCE1 == "frame_mean":
                scale1 = tl.full((ROWS, 1), 1.0, tl.float32)
            for begin in range(0, width, CHUNK * UNROLL):
                tokens = _tiles(
                    x_ptr, None, None, step0, row, state0, mean0, begin, width, x_stride_d,
                    "none", CHUNK, UNROLL, EVEN,
                )  # fmt: skip
                if METRIC0 == "gaussian":
                    others0 = _tiles(
                        x_ptr, state0_ptr, mean0_ptr, step0, row0, state0, mean0, begin,
                        width, x_stride_d, REFERENCE0, CHUNK, UNROLL, EVEN,
                    )  # fmt: skip
                if METRIC1 == "gaussian":
                    others1 = _tiles(
                        x_ptr, state1_ptr, mean1_ptr, step1, row1, state1, mean1, begin,
                        width, x_stride_d, REFERENCE1, CHUNK, UNROLL, EVEN,
                    )  # fmt: skip
                if channels_ptr is not None:
                    shown = _shown(channels_ptr + s * width, begin, width, CHUNK, UNROLL)
                for u in tl.static_range(UNROLL):
                    token = tokens[u].to(tl.float32) * own_scale
                    if METRIC0 == "gaussian":
                        apart = token - others0[u].to(tl.float32) * scale0
                        if channels_ptr is not None:
                            apart = tl.where(shown[u], apart, 0.0)
                        first0 = tl.fma(apart, apart, first0)
                    if METRIC1 == "gaussian":
                        apart = token - others1[u].to(tl.float32) * scale1
                        if channels_ptr is not None:
                            apart = tl.where(shown[u], apart, 0.0)
                        first1 = tl.fma(apart, apart, first1)

        score = tl.zeros((ROWS,), tl.float32)
        if external_ptr is not None:
            given = tl.load(external_ptr + i, mask=there, other=0.0).to(tl.float32)
            score += given * external_weight
        if TERMS > 0:
            value = _metric(tl.sum(first0, 1), other0, own_squares, compared, METRIC0)
            if state0_ptr is None and mean0_ptr is None:
                value = tl.where(step0 >= 0, value, float("nan"))
            score += value * weight0
        if TERMS > 1:
            value = _metric(tl.sum(first1, 1), other1, own_squares, compared, METRIC1)
            if state1_ptr is None and mean1_ptr is None:
                value = tl.where(step1 >= 0, value, float("nan"))
            score += value * weight1

        marks = tl.where(all_squares < float("inf"), 0, BROKEN)
        if ALWAYS == "first":
            marks |= tl.where(t == 0, FIRST, 0)
        if ALWAYS == "first_of_stream":
            seen = 0
            if seen_steps_ptr is not None:
                seen = tl.load(seen_steps_ptr + s)
            marks |= tl.where((t == 0) & (seen == 0), FIRST, 0)
        if mask_ptr is not None:
            shown = tl.load(mask_ptr + i, mask=there, other=0) != 0
            if MASK_OR:
                marks |= tl.where(shown, MASKED_IN, 0)
            else:
                marks |= tl.where(shown, 0, MASKED_OUT)
        tl.store(score_ptr + i, score, mask=there)
        tl.store(marks_ptr + i, marks.to(tl.uint8), mask=there)
        if (REFERENCE0 == "last_kept") | (REFERENCE1 == "last_kept"):
            stays = passes(score, threshold, KEEP) | ((marks & MUST) != 0)
            kept = tl.where(stays & ((marks & MASKED_OUT) == 0), t, kept)
