"""select_changed, gather_rows and merge_rows in C++ (CPU)."""

from __future__ import annotations

import math

import torch

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
    frames, places, width = feature.shape
    index = torch.empty((frames, capacity), dtype=torch.int32)
    count = torch.empty((frames,), dtype=torch.int32)
    similarity = torch.empty((frames, places), dtype=torch.float32)
    if force is not None:
        force = _dense(force)
    native()[0].select_changed_cpu(
        _DTYPES[feature.dtype],
        _METRICS[metric],
        math.nan if threshold is None else threshold,
        (
            frames, places, width, k, capacity, *_frames(feature), *_frames(reference),
            force.stride(0) if force is not None and force.dim() == 2 else 0,
        ),
        (
            feature.data_ptr(), reference.data_ptr(), 0 if force is None else force.data_ptr(),
            index.data_ptr(), count.data_ptr(), similarity.data_ptr(),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    return index, count, similarity


def gather_rows_cpu(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See ``vicostream_kernels.gather_rows``; ``torch.get_num_threads()`` threads."""
    (frame, row, inner), (listed, entry) = x.stride(), index.stride()
    if inner != 1:
        x = x.contiguous()
        frame, row, _ = x.stride()
    if entry != 1:
        index = index.contiguous()
        listed = index.stride(0)
    (frames, places, width), rows = x.shape, index.shape[1]
    out = x.new_empty((frames, rows, width))
    native()[0].gather_rows_cpu(
        _DTYPES[x.dtype],
        (frames, places, width, rows, frame, row, listed),
        (x.data_ptr(), index.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


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
    frames, replaced, width = rows.shape
    places = base.shape[-2]
    out = torch.empty((frames, places, width), dtype=base.dtype)
    native()[0].merge_rows_cpu(
        _DTYPES[base.dtype],
        (
            frames, places, width, replaced, *_frames(base), *_frames(rows), index.stride(0),
            *((0, 0) if residual is None else _frames(residual)),
        ),
        (
            base.data_ptr(), rows.data_ptr(), index.data_ptr(),
            0 if residual is None else residual.data_ptr(), out.data_ptr(),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
