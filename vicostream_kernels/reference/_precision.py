"""The precision in which the reference computes.

The truth is float64 in, float64 out. For other inputs it accumulates in float32, as every backend
does. Tests also ask what error torch itself makes in a dtype: ``accumulate_in(torch.bfloat16)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_forced: ContextVar[torch.dtype | None] = ContextVar("vicostream_accumulate_dtype", default=None)


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 otherwise, unless ``accumulate_in`` says another."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def accumulate_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the block the reference computes in ``dtype`` throughout."""
    token = _forced.set(dtype)
    try:
        yield
    finally:
        _forced.reset(token)
