"""The definition of ``prune_tokens``: score, decide, compact; no host sync, fixed capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vicostream_kernels.reference._precision import accumulate_dtype
from vicostream_kernels.reference._prune_score import Carried, score_chunk

if TYPE_CHECKING:
    from vicostream_kernels.ops._prune_rule import PruneRule

_MUST, _MAY, _OUT = 0, 1, 2


def prune_tokens(
    x: torch.Tensor,
    positions: torch.Tensor,
    rule: PruneRule,
    shapes: Sequence[int] | None,
    tokens: torch.Tensor,
    out_positions: torch.Tensor,
    index: torch.Tensor,
    cu_count: torch.Tensor,
    mask: torch.Tensor,
    steps: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
    last_kept: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    mean_count: torch.Tensor | None = None,
    external_score: torch.Tensor | None = None,
    external_mask: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    group_k: torch.Tensor | None = None,
) -> None:
    """See ``vicostream_kernels.prune_tokens``; writes into its arguments.

    x is [T, N, D] with ``shapes=None``, or packed [M, D] with ``shapes`` = (T0, N0, T1, N1, ...).
    """
    width = x.shape[-1]
    chunks = [tuple(x.shape[:2])] if shapes is None else list(zip(shapes[::2], shapes[1::2]))
    flat = x.reshape(-1, width)
    dtype = accumulate_dtype(x)
    no_mask = flat.new_zeros(flat.shape[0], dtype=torch.bool)
    given = no_mask if external_mask is None else external_mask.reshape(-1)
    extra = given if rule.mask == "or" else no_mask
    out = ~given if rule.mask == "and" and external_mask is not None else no_mask

    scores, always, broken, start = [], [], [], 0
    for row, (t, n) in enumerate(chunks):
        part = slice(start, start + t * n)
        start += t * n
        chunk = flat[part].view(t, n, width).to(dtype)
        squares = (chunk * chunk).sum(-1) if rule.terms else chunk.new_zeros(t, n)
        first = _always_kept(t, n, rule, None if steps is None else steps[row], flat.device)
        bad = ~squares.isfinite()
        must = first | bad | extra[part].view(t, n)
        chunk_out = out[part].view(t, n)

        def keep_step(step, score, must=must, chunk_out=chunk_out):
            return (_passes(score, rule) | must[step]) & ~chunk_out[step]

        carried = Carried(
            *(None if s is None else s[row, :n] for s in (previous, last_kept)),
            *(None if s is None else s[row] for s in (mean, mean_count)),
        )
        external = None
        if rule.external:
            external = external_score.reshape(-1)[part].view(t, n).to(dtype)
        score, mean_after, count_after = score_chunk(
            chunk, squares, rule, carried, external, keep_step
        )
        if mean is not None:
            mean[row].copy_(mean_after)
            mean_count[row].copy_(count_after)
        scores.append(score.flatten())
        always.append(first.flatten())
        broken.append(bad.flatten())

    score, first, bad = _joined(scores), _joined(always), _joined(broken)
    must = (first | bad | extra) & ~out
    if rule.ranked:
        chosen = _ranked(score, must, out, rule, chunks, group_ids, group_k) & ~extra
    else:
        chosen = _passes(score, rule)
    if rule.reduce == "any":
        chosen = _whole_columns((chosen | (bad & ~out)) & ~first, chunks)
    keep = (chosen & ~out) | must
    mask.copy_(keep.view(mask.shape))
    _update_tokens(flat, keep, chunks, steps, previous, last_kept)
    _compact(flat, positions, keep, chunks, tokens, out_positions, index, cu_count)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _always_kept(
    t: int, n: int, rule: PruneRule, steps: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    always = torch.zeros(t, n, dtype=torch.bool, device=device)
    if rule.always_keep == "first_of_stream" and steps is not None:
        always[0] = steps == 0
    elif rule.always_keep != "none":
        always[0] = True
    return always


def _passes(score: torch.Tensor, rule: PruneRule) -> torch.Tensor:
    """What the threshold keeps; written as what it does not drop, so that NaN is kept."""
    if rule.threshold is None:
        return torch.ones_like(score, dtype=torch.bool)
    if rule.keep == "below":
        return ~(score >= rule.threshold)
    if rule.keep == "at_most":
        return ~(score > rule.threshold)
    if rule.keep == "above":
        return ~(score <= rule.threshold)
    return ~(score < rule.threshold)


def _whole_columns(chosen: torch.Tensor, chunks: list[tuple[int, int]]) -> torch.Tensor:
    """reduce="any": a location chosen at one step of a chunk is chosen at all of them."""
    parts, start = [], 0
    for t, n in chunks:
        column = chosen[start : start + t * n].view(t, n).any(0)
        parts.append(column.expand(t, n).flatten())
        start += t * n
    return _joined(parts)


def _ranked(
    score: torch.Tensor,
    must: torch.Tensor,
    out: torch.Tensor,
    rule: PruneRule,
    chunks: list[tuple[int, int]],
    group_ids: torch.Tensor | None,
    group_k: torch.Tensor | None,
) -> torch.Tensor:
    """The first ``count`` of each unit (and group): what must stay, then by score, then index."""
    device = score.device
    if rule.scope == "step":
        sizes = [n for t, n in chunks for _ in range(t)]
    elif rule.scope == "chunk":
        sizes = [t * n for t, n in chunks]
    else:
        sizes = [score.numel()]
    unit = torch.repeat_interleave(
        torch.arange(len(sizes), device=device),
        torch.tensor(sizes, device=device),
        output_size=score.numel(),
    )
    low = score if rule.keeps_low else -score
    low = low.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    group = torch.zeros_like(unit) if group_ids is None else group_ids.reshape(-1).long()
    if group_k is None and isinstance(rule.k, tuple):
        group_k = torch.tensor(rule.k, dtype=torch.int32, device=device)
    grouped = group >= 0
    if group_k is not None:
        grouped &= group < group_k.shape[-1]
    rank_class = torch.where(must, _MUST, torch.where(out | ~grouped, _OUT, _MAY))

    order = low.argsort(stable=True)
    for key in (rank_class, unit) if group_ids is None else (rank_class, group, unit):
        order = order[key[order].argsort(stable=True)]
    sorted_unit, sorted_group = unit[order], group[order]
    place = torch.arange(order.numel(), device=device)
    starts = torch.ones_like(must)
    starts[1:] = (sorted_unit[1:] != sorted_unit[:-1]) | (sorted_group[1:] != sorted_group[:-1])
    first = torch.where(starts, place, 0).cummax(0).values
    rank = torch.empty_like(place).scatter_(0, order, place - first)

    if group_k is not None:
        table = group_k.long().expand(len(sizes), -1) if group_k.dim() == 1 else group_k.long()
        quota = table[unit, group.clamp(0, table.shape[1] - 1)]
    elif group_ids is None:
        quota = torch.tensor([rule.count(size) for size in sizes], device=device)[unit]
    else:
        quota = _quota_of_groups(rule, starts, first, order)
    return must | ((rank < quota) & (rank_class == _MAY))


def _quota_of_groups(
    rule: PruneRule, starts: torch.Tensor, first: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """``rule.count`` of each token's group, whose size only the device knows."""
    total = order.numel()
    place = torch.arange(total, device=order.device)
    next_start = torch.where(starts, place, total).roll(-1)
    next_start[-1] = total
    size = next_start.flip(0).cummin(0).values.flip(0) - first
    if rule.ratio is not None:
        quota = (size.double() * rule.ratio).long()
    elif rule.drop_ratio is not None:
        dropped = (size.double() * rule.drop_ratio).long()
        quota = size - dropped // rule.drop_multiple * rule.drop_multiple
    else:
        quota = torch.full_like(size, rule.k)
    return torch.empty_like(quota).scatter_(0, order, quota)


def _update_tokens(
    flat: torch.Tensor,
    keep: torch.Tensor,
    chunks: list[tuple[int, int]],
    steps: torch.Tensor | None,
    previous: torch.Tensor | None,
    last_kept: torch.Tensor | None,
) -> None:
    if steps is None:
        return
    start = 0
    for row, (t, n) in enumerate(chunks):
        part = slice(start, start + t * n)
        start += t * n
        chunk = flat[part].view(t, n, -1)
        steps[row] += t
        if previous is not None:
            previous[row, :n] = chunk[-1]
        if last_kept is not None:
            for step, kept in zip(chunk, keep[part].view(t, n, 1)):
                last_kept[row, :n] = torch.where(kept, step, last_kept[row, :n])


def _compact(
    flat: torch.Tensor,
    positions: torch.Tensor,
    keep: torch.Tensor,
    chunks: list[tuple[int, int]],
    tokens: torch.Tensor,
    out_positions: torch.Tensor,
    index: torch.Tensor,
    cu_count: torch.Tensor,
) -> None:
    capacity = index.numel()
    kept_so_far = keep.cumsum(0)
    ends = torch.tensor([t * n for t, n in chunks], device=flat.device).cumsum(0)
    cu_count[0] = 0
    cu_count[1:] = kept_so_far[ends - 1]

    # Tokens that are not kept or do not fit are all written to one slot behind the last.
    slot = torch.where(keep & (kept_so_far <= capacity), kept_so_far - 1, capacity)
    rows = torch.full((capacity + 1,), -1, dtype=torch.long, device=flat.device)
    rows.scatter_(0, slot, torch.arange(keep.numel(), device=flat.device))
    rows = rows[:capacity]
    index.copy_(rows)
    known = _known_count(cu_count)
    filled = capacity if known is None else min(known, capacity)
    tokens[filled:] = 0
    out_positions[:, filled:] = 0
    source = rows[:filled].clamp_min(0)
    tokens[:filled] = flat.index_select(0, source)
    out_positions[:, :filled] = positions.reshape(3, -1).index_select(1, source)
    if known is None:
        tokens.masked_fill_((rows < 0).unsqueeze(-1), 0)
        out_positions.masked_fill_(rows < 0, 0)


def _known_count(cu_count: torch.Tensor) -> int | None:
    """The count where reading it waits for nothing; else the padding is gathered, then wiped."""
    return int(cu_count[-1]) if cu_count.device.type == "cpu" else None
