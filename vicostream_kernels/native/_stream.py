"""Where a native CUDA kernel is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Makes ``device`` the current one and gives the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
