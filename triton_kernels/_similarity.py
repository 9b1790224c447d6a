"""How alike two vectors are, from sums over them: what prune and reuse share.

A row's sums depend on its width and layout alone: the same tile for every row of a call, summed in
the same order. So a row has the same bits whatever is beside it in the call.
"""

import torch
import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._launch import cdiv, power_of_2


def regular(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its rows lie otherwise than a contiguous tensor's in what loads follow.

    How wide a kernel loads settles the order in which it adds. So that must follow from the width
    alone: a row has the same bits in a call of one step and of many, and equal rows of two tensors
    have equal sums, however they lie.
    """
    width, strides = x.shape[-1], list(x.stride())
    if width == 1:
        strides[-1] = 1
    for i in range(x.dim() - 2, -1, -1):
        if x.shape[i] == 1:  # its stride says nothing
            strides[i] = x.shape[i + 1] * strides[i + 1]
    if width % 16 == 0:
        even = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    else:  # then a contiguous tensor's rows begin anywhere
        even = strides[-2] % 16 != 0
    if not even or strides[-1] != 1:
        return x.clone(memory_format=torch.contiguous_format)
    return x if tuple(strides) == x.stride() else x.as_strided(x.shape, strides)


def row_tile(width: int) -> tuple[int, int]:
    """(rows, channels) of a tile for rows of so many channels; for four warps.

    2048 elements, 16 for each thread, so that all loads of the usual rows are in flight at once.
    """
    block = min(2048, max(16, power_of_2(width)))
    return max(1, min(32, 2048 // block)), block


def sum_tiles(width: int, most: int) -> dict[str, int]:
    """The launch of kernels that sum over rows: tiles of CHUNK channels, UNROLL loaded at once.

    A warp has a row of its own: with four to a row, most of what they issue is what all of them do
    alike. Its tiles are 256 channels, 8 of each thread, which keeps a sum for each of those; up to
    ``most`` of them are in flight, for which ptxas is given registers: it would rather have more
    programs at a time. Narrow rows share a tile of four warps instead. EVEN: no tile goes beyond
    the width, and none needs a mask.
    """
    if width < 256:
        rows, chunk = row_tile(width)
        return {
            "ROWS": rows,
            "CHUNK": chunk,
            "UNROLL": 1,
            "EVEN": width == chunk,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
    tiles = cdiv(width, 256)
    unroll = cdiv(tiles, cdiv(tiles, most))
    fit = [n for n in range(unroll, unroll // 2, -1) if width % (256 * n) == 0]
    return {
        "ROWS": 1, "CHUNK": 256, "UNROLL": fit[0] if fit else unroll, "EVEN": bool(fit),
        "num_warps": 1, "maxnreg": 128, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit
def cosine_of(dot, a_squares, b_squares):
    """Cosine from a dot product and sums of squares: 1 of two zero vectors, 0 of one.

    The root of the product of equal sums is that sum, so equal vectors have exactly 1; float64
    keeps the product in range. NaN stays.
    """
    product = a_squares.to(tl.float64) * b_squares.to(tl.float64)
    value = dot.to(tl.float64) / tl.sqrt(tl.where(product == 0.0, 1.0, product))
    value = tl.where(value > 1.0, 1.0, tl.where(value < -1.0, -1.0, value))
    both_zero = (a_squares == 0.0) & (b_squares == 0.0)
    return tl.where(product == 0.0, tl.where(both_zero, 1.0, 0.0), value).to(tl.float32)


@triton.jit
def low_value(score):
    """The score as rankings compare it: NaN comes before all."""
    return tl.where(score != score, float("-inf"), score)


@triton.jit
def comes_before(value, index, other_value, other_index):
    """Whether (value, index) comes before the other: the lower value, then the lower index."""
    return (value < other_value) | ((value == other_value) & (index < other_index))
