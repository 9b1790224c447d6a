"""Test inputs: seeded, non-contiguous by default, with NaN in the gaps between their elements."""

from __future__ import annotations

import torch


def _gapped(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: float) -> torch.Tensor:
    """An empty view of ``shape`` whose rows lie apart in a larger buffer filled with ``fill``."""
    if len(shape) < 2:
        return torch.full(shape, fill, dtype=dtype, device=device)
    padded = (*[size + 1 for size in shape[:-1]], shape[-1] + 8)
    buffer = torch.full(padded, fill, dtype=dtype, device=device)
    return buffer[tuple(slice(0, size) for size in shape)]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between rows (the last dimension stays dense)."""
    fill = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2
    out = _gapped(tuple(x.shape), x.dtype, str(x.device), fill)
    return out.copy_(x)


def randn(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    gaps: bool = True,
    device: str = "cpu",
) -> torch.Tensor:
    """Standard normal values, drawn on the CPU so that every device sees the same ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).to(device)
    return strided(x) if gaps else x


def ints(
    shape: tuple[int, ...],
    low: int,
    high: int,
    *,
    dtype: torch.dtype = torch.int32,
    seed: int = 0,
    gaps: bool = True,
    device: str = "cpu",
) -> torch.Tensor:
    """Integers in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high, shape, generator=generator).to(dtype).to(device)
    return strided(x) if gaps else x
