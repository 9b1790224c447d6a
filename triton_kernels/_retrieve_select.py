"""retrieve: the order of preference as integers, how many are chosen, and their list.

A unit is a group of adjacent blocks. Its key sorts by preference (forced, by score, NaN, absent)
and then by the lower index; no two keys of a row are equal, so any top-k of them is the right one.
"""

import triton
import triton.language as tl

_FORCED = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(-0x7FFFFFFF)
_ABSENT = tl.constexpr(-0x80000000)


@triton.jit
def _limit(num_blocks_ptr, num_blocks_stride, s, blocks):
    limit = blocks
    if num_blocks_ptr is not None:
        limit = tl.minimum(tl.maximum(tl.load(num_blocks_ptr + s * num_blocks_stride), 0), blocks)
    return limit


@triton.jit
def _unit_of(key):
    """The unit of a key, and whether it is there."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32), (key >> 32) > _ABSENT


@triton.jit
def _units_sum(values_ptr, stride, unit, group, limit, there):
    """Sums of int32 values, not below 0, over the blocks of units."""
    total = tl.zeros_like(unit).to(tl.int64)
    for g in range(0, group):
        b = unit * group + g
        value = tl.load(values_ptr + b.to(tl.int64) * stride, mask=there & (b < limit), other=0)
        total += tl.maximum(value, 0)
    return total


@triton.jit(do_not_specialize=["rows", "blocks", "units", "tiles", "group", "first", "last"])
def keys_kernel(
    scores_ptr,  # [S, R, NB] float32
    num_blocks_ptr,
    keys_ptr,  # [S, R, units] int64
    rows,
    blocks,
    units,
    tiles,
    group,
    first,  # blocks forced at the start
    last,  # and at the end
    num_blocks_stride,
    TILE: tl.constexpr,
):
    """One program: the keys of TILE units. What bounds it: memory, 12 bytes a block."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    limit = _limit(num_blocks_ptr, num_blocks_stride, row // rows, blocks)
    scores_ptr += row * blocks
    total = tl.zeros((TILE,), tl.float32)
    numbers = tl.zeros((TILE,), tl.int32)
    for g in range(0, group):
        b = unit * group + g
        score = tl.load(scores_ptr + b, mask=b < limit, other=float("nan"))
        is_number = score == score
        total = tl.where(is_number, total + score, total)
        numbers += is_number.to(tl.int32)
    mean = total
    if group > 1:
        mean = tl.div_rn(total, tl.maximum(numbers, 1).to(tl.float32))
    # As integers in the order of the floats; -0 is 0.
    bits = tl.where(mean == 0.0, 0.0, mean).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where((numbers > 0) & (mean == mean), order, _NAN)
    is_last = ((unit + 1) * group > limit - last) & (last > 0)
    order = tl.where((unit * group < first) | is_last, _FORCED, order)
    order = tl.where(unit * group < limit, order, _ABSENT)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - unit).to(tl.int64)
    tl.store(keys_ptr + row * units + unit, key, mask=unit < units)


@triton.jit(
    do_not_specialize=[
        "rows", "blocks", "units", "group", "budget", "mass_bits",
        "sizes_stride_s",  # grows with the history
    ]
)  # fmt: skip
def reach_kernel(
    keys_ptr,  # [S, R, units] int64, descending
    scores_ptr,  # [S, R, NB] float32
    num_blocks_ptr,
    sizes_ptr,  # [S, NB] int32 or None
    target_ptr,  # [S, R] int32: how many units reach the mass, or fit into the budget
    rows,
    blocks,
    units,
    group,
    budget,
    mass_bits,  # the float64 as its bits
    num_blocks_stride,
    sizes_stride_s,
    sizes_stride_n,
    MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one row, walked in the order of preference; the same sums in the same order
    whatever else is in the call. What bounds it: latency, one tile after another."""
    row = tl.program_id(0).to(tl.int64)
    s = row // rows
    limit = _limit(num_blocks_ptr, num_blocks_stride, s, blocks)
    keys_ptr += row * units
    scores_ptr += row * blocks
    if sizes_ptr is not None:
        sizes_ptr += s * sizes_stride_s
    if MASS:
        mass = mass_bits.to(tl.float64, bitcast=True)
        whole = tl.full((), 0.0, tl.float64)
        target, last_heavy = units, 0
        for walk in tl.static_range(2):  # first for all of it, then for what reaches the share
            reached = tl.full((), 0.0, tl.float64)
            for start in range(0, units, TILE):
                i = start + tl.arange(0, TILE)
                unit, there = _unit_of(tl.load(keys_ptr + i, mask=i < units, other=-(2**63)))
                weight = tl.zeros((TILE,), tl.float64)
                for g in range(0, group):
                    b = unit * group + g
                    known = there & (b < limit)
                    score = tl.load(scores_ptr + b, mask=known, other=0.0).to(tl.float64)
                    score = tl.where(score > 0.0, score, 0.0)  # NaN has no weight
                    if sizes_ptr is not None:
                        at = b.to(tl.int64) * sizes_stride_n
                        size = tl.load(sizes_ptr + at, mask=known, other=0)
                        score *= tl.maximum(size, 0).to(tl.float64)
                    weight += score
                sums = reached + tl.cumsum(weight, 0)
                if walk == 0:
                    last_heavy = tl.maximum(last_heavy, tl.max(tl.where(weight > 0.0, i + 1, 0), 0))
                else:
                    first = tl.where((sums >= mass * whole) & (i < units), i, units)
                    target = tl.minimum(target, tl.min(first, 0))
                # Not tl.sum of the weights, whose order is another: what they all weigh must be
                # one of the sums.
                reached = tl.maximum(reached, tl.max(sums, 0))
            whole = reached
        # Sums of another order may reach it late: not among the last ones, that weigh nothing.
        target = tl.minimum(target + 1, last_heavy)
        tl.store(target_ptr + row, target)
    else:
        used = tl.full((), 0, tl.int64)
        target = 0
        for start in range(0, units, TILE):
            i = start + tl.arange(0, TILE)
            unit, there = _unit_of(tl.load(keys_ptr + i, mask=i < units, other=-(2**63)))
            size = _units_sum(sizes_ptr, sizes_stride_n, unit, group, limit, there)
            sums = used + tl.cumsum(size, 0)
            target += tl.sum(((sums <= budget) & there).to(tl.int32), 0)
            used += tl.sum(size, 0)
        tl.store(target_ptr + row, target)


@triton.jit(
    do_not_specialize=[
        "rows", "blocks", "kept", "tiles", "capacity", "group", "target", "ratio_bits", "least",
        "first", "last",
    ]
)  # fmt: skip
def pick_kernel(
    keys_ptr,  # [S, R, kept] int64, descending
    num_blocks_ptr,
    target_ptr,  # [S, R] int32 or None
    index_ptr,  # [S, R, capacity] int32
    count_ptr,  # [S, R] int32
    rows,
    blocks,
    kept,
    tiles,
    capacity,
    group,
    target,  # units, for a number that the host knows
    ratio_bits,  # the float64 as its bits
    least,  # units
    first,
    last,
    num_blocks_stride,
    RATIO: tl.constexpr,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: the places of TILE units of a row among those chosen, by counting the lower
    ones. What bounds it: latency, K comparisons a unit of K."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    limit = _limit(num_blocks_ptr, num_blocks_stride, row // rows, blocks)
    wanted = target
    if target_ptr is not None:
        wanted = tl.load(target_ptr + row)
    if RATIO:
        share = limit.to(tl.float64) * ratio_bits.to(tl.float64, bitcast=True)
        wanted = share.to(tl.int32) // group
    # The forced units: those at the start, and those at the end that are not among them.
    there = tl.cdiv(limit, group)
    at_start = tl.minimum(tl.cdiv(first, group), there)
    from_end = tl.where(last > 0, tl.maximum(limit - last, 0) // group, there)
    forced = at_start + tl.maximum(there - tl.maximum(at_start, from_end), 0)
    wanted = tl.minimum(tl.maximum(tl.maximum(wanted, least), forced), capacity // group)

    keys_ptr += row * kept
    i = tile * TILE + tl.arange(0, TILE)
    unit, exists = _unit_of(tl.load(keys_ptr + i, mask=i < kept, other=-(2**63)))
    chosen = exists & (i < wanted)
    # Summed once: a sum over threads takes steps.
    slots = tl.zeros((TILE, OTHERS), tl.int32)
    counts = tl.zeros((OTHERS,), tl.int32)
    for start in range(0, kept, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other, other_exists = _unit_of(tl.load(keys_ptr + j, mask=j < kept, other=-(2**63)))
        other_chosen = other_exists & (j < wanted)
        lower = other_chosen[None, :] & (other[None, :] < unit[:, None])
        slots += lower.to(tl.int32)
        # The last unit may be short; it is the last of the list as well.
        size = tl.minimum(limit - other * group, group)
        counts += tl.where(other_chosen, size, 0)
    slot = tl.sum(slots, 1)
    count = tl.sum(counts, 0)
    index_ptr += row * capacity
    for g in range(0, group):
        b = unit * group + g
        tl.store(index_ptr + slot * group + g, b, mask=chosen & (b < limit))
    for start in range(tile * TILE * group, tl.minimum((tile + 1) * TILE * group, capacity), TILE):
        p = start + tl.arange(0, TILE)
        tl.store(index_ptr + p, -1, mask=(p >= count) & (p < capacity))
    if tile == 0:
        tl.store(count_ptr + row, count)
