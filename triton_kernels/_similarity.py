"""How alike two vectors are, from sums over them: what prune and reuse share.

A row's sums depend on its width and layout alone: the same tile for every row of a call, summed in
the same order. So a row has the same bits whatever is beside it in the call.
"""

import triton
import triton.language as tl


def row_tile(width: int) -> tuple[int, int]:
    """(rows, channels) of a tile for rows of so many channels; for four warps.

    2048 elements, 16 for each thread, so that all loads of the usual rows are in flight at once.
    """
    block = min(2048, max(16, triton.next_power_of_2(width)))
    return max(1, min(32, 2048 // block)), block


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
