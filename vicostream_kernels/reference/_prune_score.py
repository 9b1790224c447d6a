"""Scores of one chunk: how far each token is from its reference, by PruneRule's definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from vicostream_kernels.reference._similarity import cosine

if TYPE_CHECKING:
    from vicostream_kernels.ops._prune_rule import PruneRule

_GAUSSIAN_SCALES = tuple(2.0 ** (k + 1) for k in range(-3, 2))


class Vectors(NamedTuple):
    """Vectors as a metric compares them, and the sums of their squares before normalising."""

    values: torch.Tensor
    squares: torch.Tensor


class Carried(NamedTuple):
    """What came before the chunk; None where there is no state or the rule does not need it."""

    previous: torch.Tensor | None
    last_kept: torch.Tensor | None
    mean: torch.Tensor | None
    mean_count: torch.Tensor | None


def compare(metric: str, a: Vectors, b: Vectors) -> torch.Tensor:
    """The metric of vectors ``a`` with ``b`` over the last dimension."""
    if metric == "cosine":
        return cosine((a.values * b.values).sum(-1), a.squares, b.squares)
    difference = a.values - b.values
    if metric == "l1":
        return difference.abs().mean(-1)
    if metric == "l2":
        return difference.square().mean(-1).sqrt()
    distance = difference.square().sum(-1)
    return sum((-distance / scale).exp() for scale in _GAUSSIAN_SCALES)


def prepare(
    metric: str,
    raw: torch.Tensor,
    channels: torch.Tensor | None,
    squares: torch.Tensor | None = None,
) -> Vectors:
    """The compared channels of ``raw``, L2-normalised for the gaussian metric.

    ``squares`` are the sums over all channels where they are known already.
    """
    values = raw if channels is None else raw.index_select(-1, channels)
    if squares is None or channels is not None:
        squares = (values * values).sum(-1)
    if metric == "gaussian":
        values = values / squares.sqrt().clamp_min(1e-12).unsqueeze(-1)
    return Vectors(values, squares)


def mean_of(values: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The mean over the second last dimension of the vectors that ``whole`` marks; 0 of none."""
    total = torch.where(whole.unsqueeze(-1), values, 0.0).sum(-2)
    return total / whole.sum(-1, keepdim=True).clamp_min(1)


def quiet_channels(x: torch.Tensor, whole: torch.Tensor, share: float) -> torch.Tensor | None:
    """The share of channels with the lowest variance over a chunk, ascending; None for all."""
    width = x.shape[-1]
    wanted = max(1, int(width * share))
    if wanted == width:
        return None
    flat, whole = x.reshape(-1, width), whole.reshape(-1)
    spread = torch.where(whole.unsqueeze(-1), flat - mean_of(flat, whole), 0.0).square().sum(0)
    return spread.argsort(stable=True)[:wanted].sort().values


def running_means(
    x: torch.Tensor, whole: torch.Tensor, by_step: bool, mean: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The running mean that each step sees [T or 1, D], then the mean and count afterwards."""
    if by_step:
        entries, known = mean_of(x, whole), whole.any(-1)
    else:
        flat, whole = x.reshape(1, -1, x.shape[-1]), whole.reshape(1, -1)
        entries, known = mean_of(flat, whole), whole.any(-1)
    seen = []
    for entry, is_known in zip(entries, known):
        count = count + is_known
        moved = mean + (entry - mean) / count.clamp_min(1)
        mean = torch.where(is_known, moved, mean)
        seen.append(mean)
    return torch.stack(seen), mean, count


def score_chunk(
    x: torch.Tensor,
    squares: torch.Tensor,
    rule: PruneRule,
    carried: Carried,
    external: torch.Tensor | None,
    keep_step: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scores of one chunk [T, N], and the running mean and its count after it.

    Args:
        x: [T, N, D] in the precision to compute in.
        squares: [T, N], the sum of squares of each token; not finite where one holds NaN or inf.
        rule: what to compare.
        carried: what came before.
        external: [T, N] in x's dtype.
        keep_step: from a step and its scores [N] to what is kept of it [N]; for last_kept.
    """
    whole = squares.isfinite()
    channels = quiet_channels(x, whole, rule.channels) if rule.terms else None
    means = mean_after = count_after = None
    if "mean" in rule.needs:
        mean, count = carried.mean, carried.mean_count
        if mean is None:
            mean, count = x.new_zeros(x.shape[-1]), whole.new_zeros((), dtype=torch.int32)
        means, mean_after, count_after = running_means(
            x, whole, rule.history == "step", mean.to(x.dtype), count
        )
    total: torch.Tensor | None = None
    if external is not None:
        total = external * rule.external
    prepared = {m: prepare(m, x, channels, squares) for m in {term.metric for term in rule.terms}}
    pending = []
    for reference, metric, weight in rule.terms:
        tokens = prepared[metric]
        if reference == "last_kept":
            pending.append((metric, weight))
            continue
        if reference == "frame_mean":
            centre = tokens.values if metric == "gaussian" else x
            anchor = mean_of(centre, whole).unsqueeze(-2)
            # Tokens are normalised before this mean, the mean itself is not.
            anchor = (
                Vectors(anchor, anchor.square().sum(-1))
                if metric == "gaussian"
                else prepare(metric, anchor, channels)
            )
            score = compare(metric, tokens, anchor)
        elif reference == "running_mean":
            score = compare(metric, tokens, prepare(metric, means.unsqueeze(-2), channels))
        else:
            score = _against_token(reference, metric, tokens, carried.previous, channels)
        score = score if weight == 1.0 else score * weight
        total = score if total is None else total + score
    if pending:
        total = _against_last_kept(pending, prepared, total, carried.last_kept, channels, keep_step)
    if total is None:
        total = x.new_zeros(x.shape[:2])
    return total, mean_after, count_after


def _against_token(
    reference: str,
    metric: str,
    tokens: Vectors,
    previous: torch.Tensor | None,
    channels: torch.Tensor | None,
) -> torch.Tensor:
    values, squares = tokens
    score = torch.full_like(squares, math.nan)
    if reference == "previous":
        other = Vectors(values[:-1], squares[:-1])
        if previous is not None:
            before = prepare(metric, previous.to(values.dtype), channels)
            score[0] = compare(metric, Vectors(values[0], squares[0]), before)
    else:
        other = Vectors(values[:1], squares[:1])
    score[1:] = compare(metric, Vectors(values[1:], squares[1:]), other)
    return score


def _against_last_kept(
    terms: list[tuple[str, float]],
    tokens: dict[str, Vectors],
    total: torch.Tensor | None,
    last: torch.Tensor | None,
    channels: torch.Tensor | None,
    keep_step: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Adds the terms (metric, weight); what is kept, all terms together decide."""
    kept = {}
    for metric, _ in terms:
        values, squares = tokens[metric]
        kept[metric] = (
            Vectors(torch.full_like(values[0], math.nan), torch.full_like(squares[0], math.nan))
            if last is None
            else prepare(metric, last.to(values.dtype), channels)
        )
    scores = []
    for step in range(len(tokens[terms[0][0]].values)):
        score = None if total is None else total[step]
        now = {m: Vectors(tokens[m].values[step], tokens[m].squares[step]) for m, _ in terms}
        for metric, weight in terms:
            one = compare(metric, now[metric], kept[metric]) * weight
            score = one if score is None else score + one
        keep = keep_step(step, score)
        for metric in now:
            kept[metric] = Vectors(
                torch.where(keep.unsqueeze(-1), now[metric].values, kept[metric].values),
                torch.where(keep, now[metric].squares, kept[metric].squares),
            )
        scores.append(score)
    return torch.stack(scores)
