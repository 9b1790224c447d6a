"""attention: what the kernels do with one tile of keys, and how a head's channels are laid out.

A head is two parts, [0, SPLIT) and [SPLIT, HEAD_DIM), each a power of two wide: 80 channels are
64 + 16 and not 128, and a rotation has the two halves that it pairs in registers. A head dim that
is a power of two, or near the next one, has one part only (PART_B = 0).

Scores are in base 2 (multiplied by log2 e), as the hardware's exponential is.
"""

import triton
import triton.language as tl

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_part(row_ptrs, live, stride_d, FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr):
    """Channels FROM to TO of some rows, 0 beyond; live None: all rows, else a mask of them."""
    c = tl.arange(0, WIDTH)
    ptrs = row_ptrs[:, None] + (FROM + c).to(tl.int64)[None, :] * stride_d
    if TO - FROM < WIDTH:
        mask = (c < TO - FROM)[None, :]
        if live is not None:
            mask = mask & live[:, None]
        part = tl.load(ptrs, mask=mask, other=0.0)
    elif live is not None:
        part = tl.load(ptrs, mask=live[:, None], other=0.0)
    else:
        part = tl.load(ptrs)
    return part


@triton.jit
def load_head(
    row_ptrs,
    live,
    stride_d,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
):
    """Both parts of some rows; the first one twice where there is no second."""
    part_a = _load_part(row_ptrs, live, stride_d, 0, SPLIT, PART_A)
    part_b = part_a
    if PART_B > 0:
        part_b = _load_part(row_ptrs, live, stride_d, SPLIT, HEAD_DIM, PART_B)
    return part_a, part_b


@triton.jit
def store_head(
    row_ptrs,
    live,
    value_a,
    value_b,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
    PART_B: tl.constexpr,
):
    """Rounds and stores both parts of some rows whose channels are dense."""
    dtype = row_ptrs.dtype.element_ty
    c = tl.arange(0, PART_A)[None, :]
    tl.store(row_ptrs[:, None] + c, value_a.to(dtype), mask=live[:, None] & (c < SPLIT))
    if PART_B > 0:
        c = SPLIT + tl.arange(0, PART_B)[None, :]
        tl.store(row_ptrs[:, None] + c, value_b.to(dtype), mask=live[:, None] & (c < HEAD_DIM))


@triton.jit
def load_rotated(
    row_ptrs,
    live,
    stride_d,
    angle_ptrs,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART_A: tl.constexpr,
):
    """Both halves of some keys, turned in fp32 by the angles of their pages and rounded again."""
    low = _load_part(row_ptrs, live, stride_d, 0, SPLIT, PART_A)
    high = _load_part(row_ptrs, live, stride_d, SPLIT, HEAD_DIM, PART_A)
    cos = _load_part(angle_ptrs, live, 1, 0, SPLIT, PART_A)
    sin = _load_part(angle_ptrs, live, 1, SPLIT, HEAD_DIM, PART_A)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def scores_of(q_a, q_b, k_a, k_b, PART_B: tl.constexpr):
    """q k^T, fp32."""
    scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    if PART_B > 0:
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
    return scores


@triton.jit
def above_nothing(top):
    """The maximum to subtract: 0 in rows that saw nothing, which would give -inf - -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def fold_tile(acc_a, acc_b, top, total, scores, scale, v_a, v_b, PART_B: tl.constexpr):
    """One step of the online softmax: the state after the tile's scores and values.

    scale is positive: the largest score is the largest scaled one, and a score is scaled in one
    operation with the subtraction.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    subtract = above_nothing(new_top)
    weights = tl.exp2(scores * scale - subtract[:, None])
    shrink = tl.exp2(top - subtract)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v_a.dtype)
    acc_a = tl.dot(weights, v_a, acc_a * shrink[:, None], input_precision="ieee")
    if PART_B > 0:
        acc_b = tl.dot(weights, v_b, acc_b * shrink[:, None], input_precision="ieee")
    return acc_a, acc_b, new_top, total


@triton.jit
def empty_state(ROWS: tl.constexpr, PART_A: tl.constexpr, PART_B: tl.constexpr):
    """Accumulators of both parts, maxima and totals before the first tile."""
    acc_a = tl.zeros((ROWS, PART_A), tl.float32)
    acc_b = acc_a
    if PART_B > 0:
        acc_b = tl.zeros((ROWS, PART_B), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    return acc_a, acc_b, top, tl.zeros((ROWS,), tl.float32)


@triton.jit
def add_sink(top, total, sink):
    """The factor of the accumulators, maximum and total when a logit (base 2) joins each row.

    A row that saw no key (total 0, not NaN) stays as it is.
    """
    new_top = tl.where(total == 0.0, top, tl.maximum(top, sink))
    subtract = above_nothing(new_top)
    shrink = tl.exp2(top - subtract)
    grown = total * shrink + tl.exp2(sink - subtract)
    return shrink, new_top, tl.where(total == 0.0, total, grown)


@triton.jit
def inverse_of(total):
    """1 / total, or 0 for a row that saw nothing."""
    return tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def log_sum_of(top, total):
    """Natural-log LSE of a row; -inf where it saw nothing."""
    return tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) * _LN_2)
