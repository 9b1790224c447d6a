"""Scorers: what a rule can't compute from tokens alone, as frozen values that run in torch.

A scorer is called once a chunk and returns the external arguments of ``prune_tokens``. What it
carries from chunk to chunk is in a dict that its caller owns, so that one value serves any number
of streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch


@dataclass(frozen=True)
class ScoredChunk:
    """What a scorer may look at.

    Attributes:
        tokens: [T, N, D], the projected tokens in raster order.
        grid: (T, rows, columns) in tokens, N = rows * columns.
        patches: [T*h*w, 3*2*14*14], normalised, as ``preprocess_frames`` orders them; for scorers
            that need "patches", else None.
        mean, std: what the patches were normalised with.
        temporal: raw frames in a patch.
        features: [T*h*w, C], what the ViT's merger reads, merge square by merge square in raster
            order; for scorers that need "features", else None.
    """

    tokens: torch.Tensor
    grid: tuple[int, int, int]
    patches: torch.Tensor | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    temporal: int = 2
    features: torch.Tensor | None = None


class External(NamedTuple):
    """External arguments of ``prune_tokens``; ``tokens`` [T, N, D] replace the chunk's."""

    score: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    group_ids: torch.Tensor | None = None
    group_k: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Scorer:
    """A named scorer.

    Attributes:
        gives: which of External's fields it fills ("group_k" counts as "groups").
        needs: what it reads besides tokens: "patches", "features".
    """

    gives: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        """The external arguments for a chunk. ``state`` is empty before a stream's first chunk (and
        where frames change their size), and the same dict from then on."""
        raise NotImplementedError
