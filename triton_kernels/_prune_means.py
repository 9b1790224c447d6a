"""prune: means over tokens, and the channels that are compared. Only for rules that need them.

Sums run over the tokens of a step in a fixed order, so a step has the same bits in any call.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._compact import wide
from vicostream_kernels.triton_kernels._prune_layout import segment_of, step_stride


@triton.jit
def inverse_norm(squares):
    """1 / norm of a vector that the gaussian metric normalises; NaN stays."""
    norm = tl.sqrt_rn(squares)
    return tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(norm < 1e-12, 1e-12, norm))


@triton.jit(do_not_specialize=["steps", "places", "tiles"])
def squares_kernel(
    x_ptr,
    channels_ptr,  # [S, D] uint8 or None: the channels that count
    squares_ptr,  # [M] float32
    table_ptr,
    steps,
    places,
    tiles,
    width,
    x_stride_t,
    x_stride_n,
    x_stride_d,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: sums of squares of ROWS tokens. What bounds it: memory, x is read once."""
    s = (tl.program_id(0) // tiles).to(tl.int64)
    steps, places, start, _, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    there = i < steps * places
    stride_t = step_stride(places, x_stride_t, x_stride_n, PACKED)
    rows = x_ptr + wide(start) * x_stride_n
    rows += (i // places).to(tl.int64) * stride_t + (i % places).to(tl.int64) * x_stride_n
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(0, width, CHUNK):
        c = first + tl.arange(0, CHUNK)
        inside = c < width
        if channels_ptr is not None:
            inside &= tl.load(channels_ptr + s * width + c, mask=inside, other=0) != 0
        at = rows[:, None] + c.to(tl.int64)[None, :] * x_stride_d
        value = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += value * value
    tl.store(squares_ptr + start + i, tl.sum(total, 1), mask=there)


@triton.jit(do_not_specialize=["max_steps", "steps", "places", "tiles"])
def means_kernel(
    x_ptr,
    squares_ptr,  # [M] float32 of all channels: tokens whose sum is not finite are left out
    scales_ptr,  # [M] float32 or None: sums of squares to normalise by
    channels_ptr,  # [S, D] uint8 or None
    means_ptr,  # [steps, D] float32
    sums_ptr,  # [steps, D] float32
    counts_ptr,  # [steps] int32
    table_ptr,
    max_steps,
    steps,
    places,
    tiles,
    width,
    x_stride_t,
    x_stride_n,
    x_stride_d,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: CHUNK channels of the mean token of a step. What bounds it: memory."""
    s = (tl.program_id(0) // (tiles * max_steps)).to(tl.int64)
    t = tl.program_id(0) // tiles % max_steps
    steps, places, start, first_step, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    if t < steps:
        c = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
        inside = c < width
        shown = inside
        if channels_ptr is not None:
            shown &= tl.load(channels_ptr + s * width + c, mask=inside, other=0) != 0
        stride_t = step_stride(places, x_stride_t, x_stride_n, PACKED)
        x_ptr += wide(start) * x_stride_n + t.to(tl.int64) * stride_t
        token = start + t * places
        total = tl.zeros((ROWS, CHUNK), tl.float32)
        count = 0
        for first in range(0, places, ROWS):
            n = first + tl.arange(0, ROWS)
            squares = tl.load(squares_ptr + token + n, mask=n < places, other=float("inf"))
            whole = squares < float("inf")
            count += tl.sum(whole.to(tl.int32), 0)
            at = n.to(tl.int64)[:, None] * x_stride_n + c.to(tl.int64)[None, :] * x_stride_d
            value = tl.load(x_ptr + at, mask=whole[:, None] & shown[None, :], other=0.0)
            value = value.to(tl.float32)
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + token + n, mask=whole, other=1.0)
                value *= inverse_norm(scale)[:, None]
            total += value
        sums = tl.sum(total, 0)
        amount = tl.zeros((CHUNK,), tl.float32) + tl.maximum(count, 1)
        at = (first_step + t).to(tl.int64) * width + c
        tl.store(means_ptr + at, tl.div_rn(sums, amount), mask=inside)
        tl.store(sums_ptr + at, sums, mask=inside)
        if tl.program_id(0) % tiles == 0:
            tl.store(counts_ptr + first_step + t, count)


@triton.jit
def _chunk_mean(sums_ptr, counts_ptr, first_step, steps, width, c, inside, CHUNK: tl.constexpr):
    """The mean token of a chunk, and of how many tokens it is."""
    total = tl.zeros((CHUNK,), tl.float32)
    count = 0
    for t in range(0, steps):
        at = wide(first_step + t) * width + c
        total += tl.load(sums_ptr + at, mask=inside, other=0.0)
        count += tl.load(counts_ptr + first_step + t)
    amount = tl.zeros((CHUNK,), tl.float32) + tl.maximum(count, 1)
    return tl.div_rn(total, amount), count


@triton.jit(do_not_specialize=["steps", "places", "tiles"])
def running_kernel(
    means_ptr,
    sums_ptr,
    counts_ptr,
    mean_ptr,  # [S, D] float32 or None: the state, moved on
    mean_count_ptr,  # [S] int32: read here, moved on by a later launch
    seen_ptr,  # [steps, D] or, by chunk, [S, D] float32
    table_ptr,
    steps,
    places,
    tiles,
    width,
    mean_stride_s,
    BY_STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the running mean of CHUNK channels of a stream, step after step.

    What bounds it: latency of its loads, which do not depend on each other.
    """
    s = (tl.program_id(0) // tiles).to(tl.int64)
    steps, places, _, first_step, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    c = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
    inside = c < width
    mean = tl.zeros((CHUNK,), tl.float32)
    count = 0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + s * mean_stride_s + c, mask=inside, other=0.0)
        count = tl.load(mean_count_ptr + s)
    if BY_STEP:
        for t in range(0, steps):
            known = tl.load(counts_ptr + first_step + t) > 0
            count += known.to(tl.int32)
            at = wide(first_step + t) * width + c
            entry = tl.load(means_ptr + at, mask=inside, other=0.0)
            amount = tl.zeros((CHUNK,), tl.float32) + tl.maximum(count, 1)
            mean = tl.where(known, mean + tl.div_rn(entry - mean, amount), mean)
            tl.store(seen_ptr + at, mean, mask=inside)
    else:
        entry, tokens = _chunk_mean(
            sums_ptr, counts_ptr, first_step, steps, width, c, inside, CHUNK
        )
        amount = tl.zeros((CHUNK,), tl.float32) + (count + 1)
        mean = tl.where(tokens > 0, mean + tl.div_rn(entry - mean, amount), mean)
        tl.store(seen_ptr + s * width + c, mean, mask=inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + s * mean_stride_s + c, mean, mask=inside)


@triton.jit(do_not_specialize=["steps", "places", "tiles"])
def spread_kernel(
    x_ptr,
    squares_ptr,
    sums_ptr,
    counts_ptr,
    spread_ptr,  # [S, D] float32
    table_ptr,
    steps,
    places,
    tiles,
    width,
    x_stride_t,
    x_stride_n,
    x_stride_d,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: how far CHUNK channels of a chunk lie from their mean, squared and summed.

    What bounds it: memory, x is read once more."""
    s = (tl.program_id(0) // tiles).to(tl.int64)
    steps, places, start, first_step, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    c = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
    inside = c < width
    mean, _ = _chunk_mean(sums_ptr, counts_ptr, first_step, steps, width, c, inside, CHUNK)
    stride_t = step_stride(places, x_stride_t, x_stride_n, PACKED)
    x_ptr += wide(start) * x_stride_n
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(0, steps * places, ROWS):
        i = first + tl.arange(0, ROWS)
        squares = tl.load(squares_ptr + start + i, mask=i < steps * places, other=float("inf"))
        whole = (squares < float("inf"))[:, None] & inside[None, :]
        at = (i // places).to(tl.int64) * stride_t + (i % places).to(tl.int64) * x_stride_n
        at = at[:, None] + c.to(tl.int64)[None, :] * x_stride_d
        apart = tl.load(x_ptr + at, mask=whole, other=0.0).to(tl.float32) - mean[None, :]
        apart = tl.where(whole, apart, 0.0)
        total += apart * apart
    tl.store(spread_ptr + s * width + c, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["tiles", "wanted"])
def channels_kernel(
    spread_ptr,  # [S, D] float32
    channels_ptr,  # [S, D] uint8
    tiles,
    width,
    wanted,
    CHUNK: tl.constexpr,
):
    """One program: which of CHUNK channels are among those of the lowest spread, ties to the
    lowest index. What bounds it: arithmetic, D comparisons a channel."""
    s = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * CHUNK + tl.arange(0, CHUNK)
    spread_ptr += s * width
    own = tl.load(spread_ptr + c, mask=c < width, other=float("inf"))
    ahead = tl.zeros((CHUNK, CHUNK), tl.int32)  # summed once: a sum over threads takes steps
    for first in range(0, width, CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = tl.load(spread_ptr + j, mask=j < width, other=float("inf"))
        before = other[None, :] < own[:, None]
        before |= (other[None, :] == own[:, None]) & (j[None, :] < c[:, None])
        ahead += before.to(tl.int32)
    rank = tl.sum(ahead, 1)
    tl.store(channels_ptr + s * width + c, (rank < wanted).to(tl.uint8), mask=c < width)
