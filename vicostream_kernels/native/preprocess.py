"""preprocess_frames on the CPU: torch's fixed-point resize, then one pass in C++ to patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from vicostream_kernels._huge_pages import in_large_pages
from vicostream_kernels.backends import native
from vicostream_kernels.reference.preprocess import resize_on_cpu, scale_and_shift


@lru_cache(maxsize=16)
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """[3, 256]: what each level of each channel becomes, by the definition's own arithmetic."""
    levels = torch.arange(256, dtype=torch.float32)
    scale, shift = (torch.tensor(v)[:, None] for v in scale_and_shift(mean, std))
    return levels.mul(scale).add_(shift).to(dtype)


def preprocess_frames_cpu(
    frames: torch.Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``vicostream_kernels.preprocess_frames``; ``torch.get_num_threads()`` threads."""
    levels = frames
    if frames.shape[1:3] != (height, width):
        levels = resize_on_cpu(frames, height, width)
    table = _table(tuple(mean), tuple(std), dtype)
    count = levels.shape[0]
    rows = -(-count // temporal) * (height // patch) * (width // patch)
    out = in_large_pages(torch.empty((rows, 3 * temporal * patch * patch), dtype=dtype))
    native()[0].pack_patches_cpu(
        (count, height, width, patch, merge, temporal, *levels.stride(), dtype.itemsize),
        (levels.data_ptr(), table.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
    )
    return out
