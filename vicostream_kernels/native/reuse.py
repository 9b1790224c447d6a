"""select_changed, gather_rows and merge_rows in C++ (CPU)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vicostream_kernels._huge_pages import in_large_pages
from vicostream_kernels.backends import native

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_METRICS = {"cosine": 0, "l1": 1, "l2": 2, "dot": 3}


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _frames(x: torch.Tensor) -> tuple[int, int]:
    """Strides of frames and rows; what all frames share has a frame stride of 0."""
    return (0, x.stride(0)) if x.dim() == 2 else x.stride()[:2]


def select_changed_cpu(
    feature: torch.Tensor,
    reference: torch.Tensor,
    k: int,
    threshold: float | None,
    capacity: int,
    metric: str,
    force: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.select_changed``; ``torch.get_num_threads()`` threads."""
    feature, reference = _dense(feature), _dense(reference)
    if force is not None:
        force = _dense(force)
    run = _select_run(feature, reference, k, threshold, capacity, metric, force)
    return run(feature, reference, force)


def _select_run(
    feature, reference, k, threshold, capacity, metric, force=None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same for all calls with dense tensors laid out like these."""
    frames, places, width = feature.shape
    sizes = (
        frames, places, width, k, capacity, *_frames(feature), *_frames(reference),
        force.stride(0) if force is not None and force.dim() == 2 else 0,
    )  # fmt: skip
    dtype, likeness = _DTYPES[feature.dtype], _METRICS[metric]
    threshold = math.nan if threshold is None else threshold
    select, int32 = native()[0].select_changed_cpu, torch.int32

    def run(feature, reference, force=None):
        index = feature.new_empty((frames, capacity), dtype=int32)
        count = feature.new_empty(frames, dtype=int32)
        similarity = feature.new_empty((frames, places), dtype=torch.float32)
        addresses = (
            feature.data_ptr(), reference.data_ptr(), 0 if force is None else force.data_ptr(),
            index.data_ptr(), count.data_ptr(), similarity.data_ptr(),
        )  # fmt: skip
        select(dtype, likeness, threshold, sizes, addresses, torch.get_num_threads())
        return index, count, similarity

    return run


def gather_rows_cpu(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See ``vicostream_kernels.gather_rows``; ``torch.get_num_threads()`` threads."""
    x, index = _dense(x), _dense(index)
    return _gather_run(x, index)(x, index)


def _gather_run(x: torch.Tensor, index: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The same for all calls with dense tensors laid out like these."""
    (frames, places, width), rows = x.shape, index.shape[1]
    sizes = (frames, places, width, rows, *_frames(x), index.stride(0))
    dtype, shape, gather = _DTYPES[x.dtype], (frames, rows, width), native()[0].gather_rows_cpu

    def run(x, index):
        out = in_large_pages(x.new_empty(shape))
        addresses = (x.data_ptr(), index.data_ptr(), out.data_ptr())
        gather(dtype, sizes, addresses, torch.get_num_threads())
        return out

    return run


def merge_rows_cpu(
    base: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``vicostream_kernels.merge_rows``; ``torch.get_num_threads()`` threads."""
    base, rows, index = _dense(base), _dense(rows), _dense(index)
    if residual is not None:
        residual = _dense(residual)
    return _merge_run(base, rows, index, residual)(base, rows, index, residual)


def _merge_run(base, rows, index, residual) -> Callable[..., torch.Tensor]:
    """The same for all calls with dense tensors laid out like these."""
    (frames, replaced, width), places = rows.shape, base.shape[-2]
    sizes = (
        frames, places, width, replaced, *_frames(base), *_frames(rows), index.stride(0),
        *((0, 0) if residual is None else _frames(residual)),
    )  # fmt: skip
    dtype, shape, merge = _DTYPES[base.dtype], (frames, places, width), native()[0].merge_rows_cpu

    def run(base, rows, index, residual):
        out = in_large_pages(base.new_empty(shape))
        addresses = (
            base.data_ptr(), rows.data_ptr(), index.data_ptr(),
            0 if residual is None else residual.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        merge(dtype, sizes, addresses, torch.get_num_threads())
        return out

    return run


def _prepare(run_for: Callable[..., Any]) -> Callable[..., Any]:
    """``run_for`` where no tensor must be copied first, else None."""

    def prepare(*given: Any) -> Callable[..., Any] | None:
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        return run_for(*given) if all(x.stride(-1) == 1 for x in tensors) else None

    return prepare


select_changed_cpu.prepare = _prepare(_select_run)
gather_rows_cpu.prepare = _prepare(_gather_run)
merge_rows_cpu.prepare = _prepare(_merge_run)
