"""The definition of ``select_changed``, ``gather_rows`` and ``merge_rows``."""

from __future__ import annotations

import torch

from vicostream_kernels.reference._precision import accumulate_dtype
from vicostream_kernels.reference._similarity import cosine


def similarity(feature: torch.Tensor, reference: torch.Tensor, metric: str) -> torch.Tensor:
    """[F, N]: how alike the rows of ``feature`` [F, N, C] and ``reference`` [F or 1, N, C] are."""
    dtype = accumulate_dtype(feature)
    a, b = feature.to(dtype), reference.to(dtype)
    if metric == "l1":
        return -(a - b).abs().mean(-1)
    if metric == "l2":
        return -(a - b).square().mean(-1).sqrt()
    dot = (a * b).sum(-1)
    if metric == "dot":
        return dot
    return cosine(dot, (a * a).sum(-1), (b * b).sum(-1))


def select_changed(
    feature: torch.Tensor,
    reference: torch.Tensor,
    k: int,
    threshold: float | None,
    capacity: int,
    metric: str,
    force: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.select_changed``: index [F, capacity], count [F], similarity."""
    reference = reference if reference.dim() == 3 else reference.unsqueeze(0)
    alike = similarity(feature, reference, metric)
    frames, places = alike.shape
    forced = torch.zeros_like(alike, dtype=torch.bool)
    if force is not None:
        forced = forced | force

    low = alike.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = low.argsort(dim=1, stable=True)
    order = order.gather(1, (~forced).int().gather(1, order).argsort(dim=1, stable=True))
    place = torch.arange(places, device=alike.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand(frames, -1))

    changed = (rank < k) | forced
    if threshold is not None:
        changed |= ~(alike >= threshold)
    listed = changed & (rank < capacity)
    slot = torch.where(listed, listed.cumsum(1) - 1, capacity)
    index = torch.full((frames, capacity + 1), -1, dtype=torch.int32, device=alike.device)
    index.scatter_(1, slot, place.int().expand(frames, -1))
    count = changed.sum(1, dtype=torch.int32)
    return index[:, :capacity].contiguous(), count, alike


def _rows_of(index: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that may be used for addressing, and which of them mean a row."""
    valid = (index >= 0) & (index < places)
    return torch.where(valid, index, 0).long(), valid


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See ``vicostream_kernels.gather_rows``."""
    rows, valid = _rows_of(index, x.shape[1])
    taken = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.where(valid.unsqueeze(-1), taken, 0)


def merge_rows(
    base: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``vicostream_kernels.merge_rows``."""
    frames, width = rows.shape[0], rows.shape[-1]
    places = base.shape[-2]
    # One more row takes what the invalid indices write.
    merged = base.new_zeros(frames, places + 1, width)
    merged[:, :places] = base
    target, valid = _rows_of(index, places)
    target = torch.where(valid, target, places).unsqueeze(-1).expand(-1, -1, width)
    merged.scatter_(1, target, rows)
    merged = merged[:, :places]
    if residual is None:
        return merged.contiguous()
    dtype = accumulate_dtype(base)
    return (merged.to(dtype) + residual.to(dtype)).to(base.dtype)
