"""TimeChat-Online's pixel mode (arXiv 2504.17343): how much the picture of a patch has changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vicostream_kernels._blocks import to_device
from vicostream_kernels.methods.scorer import External, ScoredChunk, Scorer


def patch_pictures(chunk: ScoredChunk) -> torch.Tensor:
    """RGB in [0, 1] of each token's square: float32 [T, temporal, N, 3, pixels]."""
    t, rows, columns = chunk.grid
    per_token = chunk.patches.shape[0] // (t * rows * columns)
    x = chunk.patches.float().view(t, rows * columns, per_token, 3, chunk.temporal, -1)
    mean, std = (
        to_device(v, torch.float32, x.device).view(3, 1, 1) for v in (chunk.mean, chunk.std)
    )
    return (x * std + mean).permute(0, 4, 1, 3, 2, 5).flatten(4)


@dataclass(frozen=True)
class PixelDifference(Scorer):
    """Mean absolute RGB difference in [0, 1] of a square: the first raw frame of step t-1 with the
    last raw frame of step t. NaN, which every rule keeps, where nothing came before and for tokens
    with NaN or inf. Causal."""

    name: str = field(default="pixel-difference", init=False)
    gives: ClassVar[frozenset[str]] = frozenset({"score"})
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        pictures = patch_pictures(chunk)
        before = state.get("first")
        scores = []
        for step in pictures:
            scores.append(
                torch.full_like(step[0, :, 0, 0], torch.nan)
                if before is None
                else (before - step[-1]).abs().mean((1, 2))
            )
            before = step[0]
        state["first"] = before.clone()
        whole = chunk.tokens.isfinite().all(-1)
        return External(score=torch.where(whole, torch.stack(scores), torch.nan))
