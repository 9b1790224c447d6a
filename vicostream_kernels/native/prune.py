"""prune_tokens in C++ (CPU): every rule of the family."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from vicostream_kernels._huge_pages import in_large_pages
from vicostream_kernels.backends import native
from vicostream_kernels.ops._prune_rule import METRICS, REFERENCES, PruneRule

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_KEEP = ("below", "at_most", "above", "at_least")
_SCOPES = ("step", "chunk", "call")
_ALWAYS = ("none", "first", "first_of_stream")


def _quota(rule: PruneRule) -> tuple[int, int, float]:
    """How a ranking counts: its kind, the number k and the ratio."""
    if rule.k is not None:
        return 1, rule.k if isinstance(rule.k, int) else 0, 0.0
    if rule.ratio is not None:
        return 2, 0, rule.ratio
    return (0, 0, 0.0) if rule.drop_ratio is None else (3, 0, rule.drop_ratio)


@lru_cache(maxsize=1024)
def _layout(
    dtype: torch.dtype,
    rule: PruneRule,
    shapes: tuple[int, ...],
    packed: bool,
    sizes: tuple[int, int, int],
    strides: tuple[int, ...],
) -> Any:
    """The rule, sizes and strides as C++ keeps them; made once for each a stream uses."""
    kind, number, ratio = _quota(rule)
    terms = [
        (REFERENCES.index(reference), METRICS.index(metric), weight)
        for reference, metric, weight in rule.terms
    ]
    choices = (
        _KEEP.index(rule.keep),
        kind,
        _SCOPES.index(rule.scope),
        _ALWAYS.index(rule.always_keep),
        int(rule.reduce == "any"),
        int(rule.mask == "or"),
        int(rule.history == "step"),
        int(packed),
    )
    width = sizes[0]
    return native()[0].PruneLayout(
        _DTYPES[dtype],
        terms,
        rule.external,
        math.nan if rule.threshold is None else rule.threshold,
        choices,
        (number, rule.drop_multiple, max(1, int(width * rule.channels))),
        ratio,
        list(shapes),
        sizes,
        strides,
    )


@lru_cache(maxsize=64)
def _quotas(k: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(k, dtype=torch.int32)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()[:2]


def prune_tokens_cpu(
    x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps=None,
    previous=None, last_kept=None, mean=None, mean_count=None, external_score=None,
    external_mask=None, group_ids=None, group_k=None,
) -> None:  # fmt: skip
    """See ``vicostream_kernels.prune_tokens``; runs on ``torch.get_num_threads()`` threads."""
    x, positions = _dense(x), _dense(positions)
    if external_score is not None:
        external_score = external_score.float().contiguous()
    if external_mask is not None:
        external_mask = external_mask.contiguous()
    if group_ids is not None:
        group_ids = group_ids.contiguous()
    if group_k is not None:
        group_k = group_k.contiguous()
    tensors = (
        tokens, out_positions, index, cu_count, mask, steps, previous, last_kept, mean, mean_count,
        external_score, external_mask, group_ids, group_k,
    )  # fmt: skip
    _run_for(x, positions, rule, shapes, *tensors)(x, positions, *tensors)


def _run_for(
    x, positions, rule, shapes, tokens, out_positions, index, cu_count, mask, steps, previous,
    last_kept, mean, mean_count, external_score, external_mask, group_ids, group_k,
) -> Callable[..., None]:  # fmt: skip
    """The same for all calls with tensors laid out like these, none of which must be copied."""
    quotas = _quotas(rule.k) if group_k is None and isinstance(rule.k, tuple) else None
    if quotas is not None:
        group_k = quotas
    groups = 0 if group_k is None else group_k.shape[-1]
    per_unit = groups if group_k is not None and group_k.dim() == 2 else 0
    packed = shapes is not None
    if not packed:
        shapes = x.shape[:2]
        by_step = (x.stride(0), x.stride(1), positions.stride(0), positions.stride(1))
        mask_step = mask.stride(0)
    else:
        by_step, mask_step = (0, x.stride(0), positions.stride(0), 0), 0
    layout = _layout(
        x.dtype,
        rule,
        tuple(shapes),
        packed,
        (x.shape[-1], index.shape[0], x.shape[:-1].numel()),
        (
            *by_step, mask_step, tokens.stride(0), out_positions.stride(0), *_rows(previous),
            *_rows(last_kept), 0 if mean is None else mean.stride(0), groups, per_unit,
        ),
    )  # fmt: skip
    prune = native()[0].prune_tokens_cpu

    def run(*tensors: torch.Tensor | None) -> None:
        """In the order of PruneArgs."""
        in_large_pages(tensors[2])
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        if quotas is not None:
            addresses[-1] = quotas.data_ptr()
        prune(layout, addresses, torch.get_num_threads())

    return run


def _prepare(x, positions, rule, shapes, *tensors) -> Callable[..., None] | None:
    external_score, external_mask, group_ids, group_k = tensors[-4:]
    whole = [t for t in (external_score, external_mask, group_ids, group_k) if t is not None]
    if _dense(x) is not x or _dense(positions) is not positions:
        return None
    if not all(t.is_contiguous() for t in whole):
        return None
    if external_score is not None and external_score.dtype != torch.float32:
        return None
    return _run_for(x, positions, rule, shapes, *tensors)


prune_tokens_cpu.prepare = _prepare
