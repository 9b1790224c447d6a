"""Frames as callers hand them in: what is taken, and what is refused before anything is."""

from __future__ import annotations

import numpy as np
import torch


def as_frames(frames: torch.Tensor | np.ndarray) -> torch.Tensor:
    """What ``ingest`` was given as a tensor; raises ``TypeError``, ``ValueError`` for what are no
    frames."""
    if not isinstance(frames, torch.Tensor):
        if not isinstance(frames, np.ndarray):
            raise TypeError(
                f"ingest: frames must be a tensor or a NumPy array, got {type(frames).__name__}"
            )
        if str(frames.dtype) == "uint8" and frames.size and not frames.flags.writeable:
            frames = frames.copy()  # torch warns about arrays that it could write to
        if any(stride < 0 for stride in frames.strides):
            frames = frames.copy()
        frames = torch.from_numpy(frames)
    if frames.dtype != torch.uint8:
        raise TypeError(f"ingest: frames must be uint8, got {frames.dtype}")
    if frames.layout != torch.strided or frames.is_meta:
        raise ValueError(
            f"ingest: frames must be a strided tensor with data, got {frames.layout} on "
            f"{frames.device}"
        )
    if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"ingest: frames must be [F, H, W, 3], got {list(frames.shape)}")
    return frames


def joined(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The frames of one chunk; those that lie on several devices (after a restore, some wait on the
    host) meet on ``device``."""
    if len(parts) == 1:
        return parts[0]
    if any(part.device != parts[0].device for part in parts):
        parts = [part.to(device) for part in parts]
    return torch.cat(parts)
