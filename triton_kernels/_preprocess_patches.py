"""preprocess: frames resized along their width, then along their height and cut into patches."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._bicubic import level, middle, tap


@triton.jit(do_not_specialize=["rows", "tiles"])
def across_kernel(
    frames_ptr,  # [F, H, W, 3] uint8
    out_ptr,  # [F, H, width_out, 3] uint8
    rows,  # F * H
    height,
    width_in,
    width_out,
    tiles,
    taps,  # an odd number, the middle one included
    shrink,
    frames_stride_f,
    frames_stride_h,
    frames_stride_w,
    frames_stride_c,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK neighbouring bytes of ROWS resized rows; the taps are made once for all.

    Each row is an array of its own: of one array over both axes, Triton chooses the axis that
    lanes lie along, and not every release the one whose loads join and whose weights are shared.

    What bounds it: memory, every frame read once, as neighbours find each other's pixels in L1; the
    loads themselves where it shrinks much, 4 x the factor of them for a byte.
    """
    first = tl.program_id(0) // tiles * ROWS
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    x, channel = e // 3, e % 3
    there = x < width_out
    sources = ()
    sums = ()
    for r in tl.static_range(ROWS):
        row = tl.minimum(first + r, rows - 1)
        frame, line = (row // height).to(tl.int64), (row % height).to(tl.int64)
        sources = sources + (frames_ptr + frame * frames_stride_f + line * frames_stride_h,)
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    pixel, off = middle(x, width_in, width_out)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, taps):
        t = number - taps // 2
        i = pixel + t
        inside = (i >= 0) & (i < width_in)
        weight = tl.where(inside, tap(t + off, shrink), 0.0)
        at = i.to(tl.int64) * frames_stride_w + channel.to(tl.int64) * frames_stride_c
        # The compiler keeps loads in order, so all of them stand before the first use of one.
        found = ()
        for r in tl.static_range(ROWS):
            found = found + (tl.load(sources[r] + at, mask=there & inside, other=0),)
        more = ()
        for r in tl.static_range(ROWS):
            more = more + (sums[r] + weight * found[r].to(tl.float32),)
        sums = more
        total += weight
    total = tl.where(there, total, 1.0)
    for r in tl.static_range(ROWS):
        value = level(sums[r] / total).to(tl.uint8)
        target = out_ptr + (first + r).to(tl.int64) * (3 * width_out) + e
        # Not `there & (first + r < rows)`: Triton 3.9's interpreter cannot "and" one with many.
        tl.store(target, value, mask=x < tl.where(first + r < rows, width_out, 0))


@triton.jit(do_not_specialize=["frames", "parts"])
def patches_kernel(
    levels_ptr,  # [F, height_in, W, 3] uint8
    out_ptr,  # [T * h * w, 3 * TEMPORAL * PATCH * PATCH]
    frames,
    height_in,
    height_out,
    width,
    parts,  # of a patch
    taps,
    shrink,
    red_scale,
    red_shift,
    green_scale,
    green_shift,
    blue_scale,
    blue_shift,
    levels_stride_f,
    levels_stride_h,
    levels_stride_w,
    levels_stride_c,
    RESIZE: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: part of a patch of one frame, channel after channel.

    What bounds it: memory, the writes: two or four bytes for every byte that is read.
    """
    part, which = tl.program_id(0) % parts, tl.program_id(0) // parts
    patch, f = which // TEMPORAL, which % TEMPORAL
    across = width // (PATCH * MERGE)
    within, square = patch % (MERGE * MERGE), patch // (MERGE * MERGE)
    squares = height_out // (PATCH * MERGE) * across
    step, square = square // squares, square % squares
    top = (square // across * MERGE + within // MERGE) * PATCH
    left = (square % across * MERGE + within % MERGE) * PATCH
    # A last step that is short of frames repeats its last.
    frame = tl.minimum(step * TEMPORAL + f, frames - 1).to(tl.int64)

    area: tl.constexpr = PATCH * PATCH
    e = part * BLOCK + tl.arange(0, BLOCK)
    channel, place = e // area, e % area
    there = channel < 3
    y, x = top + place // PATCH, left + place % PATCH
    sources = (
        levels_ptr
        + frame * levels_stride_f
        + x.to(tl.int64) * levels_stride_w
        + channel.to(tl.int64) * levels_stride_c
    )
    if RESIZE:
        pixel, off = middle(y, height_in, height_out)
        total = tl.zeros((BLOCK,), tl.float32)
        summed = tl.zeros((BLOCK,), tl.float32)
        for number in range(0, taps):
            t = number - taps // 2
            i = pixel + t
            inside = there & (i >= 0) & (i < height_in)
            weight = tl.where(inside, tap(t + off, shrink), 0.0)
            found = tl.load(sources + i.to(tl.int64) * levels_stride_h, mask=inside, other=0)
            summed += weight * found.to(tl.float32)
            total += weight
        value = level(summed / tl.where(there, total, 1.0))
    else:
        found = tl.load(sources + y.to(tl.int64) * levels_stride_h, mask=there, other=0)
        value = found.to(tl.float32)
    scale = tl.where(channel == 0, red_scale, tl.where(channel == 1, green_scale, blue_scale))
    shift = tl.where(channel == 0, red_shift, tl.where(channel == 1, green_shift, blue_shift))
    target = out_ptr + ((patch.to(tl.int64) * 3 + channel) * TEMPORAL + f) * area + place
    tl.store(target, (value * scale + shift).to(out_ptr.dtype.element_ty), mask=there)
