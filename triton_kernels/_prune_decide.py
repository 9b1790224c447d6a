"""prune: which tokens stay, from their scores and marks."""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._prune_layout import segment_of, step_stride
from vicostream_kernels.triton_kernels._prune_score import (
    BROKEN,
    FIRST,
    MASKED_IN,
    MASKED_OUT,
    MUST,
    passes,
)
from vicostream_kernels.triton_kernels._similarity import comes_before, low_value


@triton.jit
def _chosen(score_ptr, chosen_ptr, i, there, threshold, KEEP: tl.constexpr):
    """What a threshold (or the ranking before) chose; all where there is neither."""
    if chosen_ptr is not None:
        chosen = tl.load(chosen_ptr + i, mask=there, other=0) != 0
    elif KEEP == "all":
        chosen = there
    else:
        chosen = passes(tl.load(score_ptr + i, mask=there, other=0.0), threshold, KEEP)
    return chosen


@triton.jit(do_not_specialize=["steps", "places", "tiles", "kept_stride_t"])
def decide_kernel(
    score_ptr,
    marks_ptr,
    chosen_ptr,  # [M] uint8 of a ranking, or None
    kept_ptr,  # [T, N] or [M] uint8
    counts_ptr,  # [blocks] int32
    table_ptr,
    steps,
    places,
    tiles,
    threshold,
    kept_stride_t,
    kept_stride_n,
    KEEP: tl.constexpr,
    ANY: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of a segment. What bounds it: latency, 5 bytes a token."""
    s = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    steps, places, start, _, first_block = segment_of(table_ptr, s, steps, places, BLOCK)
    local = tile * BLOCK + tl.arange(0, BLOCK)
    there = local < steps * places
    if tile * BLOCK < steps * places:
        marks = tl.load(marks_ptr + start + local, mask=there, other=0)
        n = local % places
        if ANY:
            column = tl.zeros((BLOCK,), tl.int32)
            for t in range(0, steps):
                i = start + t * places + n
                other = tl.load(marks_ptr + i, mask=there, other=0)
                chosen = _chosen(score_ptr, chosen_ptr, i, there, threshold, KEEP)
                chosen |= (other & (BROKEN | MASKED_OUT)) == BROKEN
                column |= (chosen & ((other & FIRST) == 0)).to(tl.int32)
            keep = column != 0
        else:
            keep = _chosen(score_ptr, chosen_ptr, start + local, there, threshold, KEEP)
        keep = (keep | ((marks & MUST) != 0)) & ((marks & MASKED_OUT) == 0) & there
        stride_t = step_stride(places, kept_stride_t, kept_stride_n, PACKED)
        at = start * kept_stride_n + (local // places).to(tl.int64) * stride_t
        tl.store(kept_ptr + at + n.to(tl.int64) * kept_stride_n, keep.to(tl.uint8), mask=there)
        tl.store(counts_ptr + first_block + tile, tl.sum(keep.to(tl.int32), 0))


@triton.jit(
    do_not_specialize=["steps", "places", "tiles", "total", "k", "ratio_bits", "multiple", "groups"]
)
def rank_kernel(
    score_ptr,
    marks_ptr,
    groups_ptr,  # [M] int32 or None
    quotas_ptr,  # [units or 1, groups] int32 or None
    chosen_ptr,  # [M] uint8
    table_ptr,
    steps,
    places,
    tiles,
    total,
    k,
    ratio_bits,  # the float64 as its bits
    multiple,
    groups,
    quotas_stride_u,
    quotas_stride_g,
    LOW: tl.constexpr,
    QUOTA: tl.constexpr,
    SCOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: the ranks of TILE tokens, by counting those of their unit that come before.

    What bounds it: arithmetic, a comparison for each pair of tokens of a unit. For steps and
    chunks that is less than the launches of a sort; a call of 35k tokens takes 10^9.
    """
    s = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    steps, places, start, first_step, _ = segment_of(table_ptr, s, steps, places, BLOCK)
    size = steps * places
    local = tile * TILE + tl.arange(0, TILE)
    there = local < size
    if tile * TILE < size:
        i = (start + local).to(tl.int32)
        # The units of the tile's tokens: [begin, end) of each.
        if SCOPE == "step":
            t = local // places
            unit = first_step + t
            begin = (start + t * places).to(tl.int32)
            end = begin + places
        elif SCOPE == "chunk":
            unit = tl.zeros_like(local) + s
            begin = tl.zeros_like(local) + start.to(tl.int32)
            end = begin + size
        else:
            unit = tl.zeros_like(local)
            begin = tl.zeros_like(local)
            end = begin + total
        low = tl.min(tl.where(there, begin, total), 0)
        high = tl.max(tl.where(there, end, 0), 0)

        score = tl.load(score_ptr + i, mask=there, other=0.0)
        if LOW == 0:
            score = -score
        value = low_value(score)
        marks = tl.load(marks_ptr + i, mask=there, other=0)
        masked_out = (marks & MASKED_OUT) != 0
        must = ((marks & MUST) != 0) & ~masked_out
        group = tl.zeros_like(i)
        if groups_ptr is not None:
            group = tl.load(groups_ptr + i, mask=there, other=-1)
        limit = 2147483647
        if quotas_ptr is not None:
            limit = groups
        may = ~(must | masked_out) & (group >= 0) & (group < limit)

        # Summed once: a sum over threads takes steps.
        befores = tl.zeros((TILE, OTHERS), tl.int32)
        alike = tl.zeros((TILE, OTHERS), tl.int32)
        for first in range(low, high, OTHERS):
            j = first + tl.arange(0, OTHERS)
            known = j < high
            other_score = tl.load(score_ptr + j, mask=known, other=0.0)
            if LOW == 0:
                other_score = -other_score
            other_marks = tl.load(marks_ptr + j, mask=known, other=0)
            other_out = (other_marks & MASKED_OUT) != 0
            other_must = ((other_marks & MUST) != 0) & ~other_out
            other_may = ~(other_must | other_out)
            same = (j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None])
            if groups_ptr is not None:
                other_group = tl.load(groups_ptr + j, mask=known, other=-1)
                same &= other_group[None, :] == group[:, None]
                alike += same.to(tl.int32)
            ahead = comes_before(
                low_value(other_score)[None, :], j[None, :], value[:, None], i[:, None]
            )
            ahead = other_must[None, :] | (other_may[None, :] & ahead)
            befores += (same & ahead).to(tl.int32)
        before = tl.sum(befores, 1)
        members = end - begin
        if groups_ptr is not None:
            members = tl.sum(alike, 1)

        if quotas_ptr is not None:
            at = unit.to(tl.int64) * quotas_stride_u + group.to(tl.int64) * quotas_stride_g
            quota = tl.load(quotas_ptr + at, mask=there & may, other=0)
        elif QUOTA == "k":
            quota = tl.zeros_like(members) + k
        else:
            share = members.to(tl.float64) * ratio_bits.to(tl.float64, bitcast=True)
            quota = share.to(tl.int32)
            if QUOTA == "drop":
                quota = members - quota // multiple * multiple
        # Tokens that only the "or" mask keeps take no part in reduce; the others that must stay do.
        chosen = (must | (may & (before < quota))) & ((marks & MASKED_IN) == 0)
        tl.store(chosen_ptr + i, chosen.to(tl.uint8), mask=there)
