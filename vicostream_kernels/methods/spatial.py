"""ViCoStream's optional spatial stage (arXiv 2606.19849): which cells of a step's grid may stay.

The released code pools rows that stand in the ViT's window order as if they were a raster, so its
neighbours are not neighbours. Here everything is in raster order: that is how ``Qwen2_5_VLRunner``
returns tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from vicostream_kernels.methods.scorer import External, ScoredChunk, Scorer


def pool(
    tokens: torch.Tensor, grid: tuple[int, int, int], kind: Literal["avg", "max"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools 2 x 2 cells of [T, N, D] tokens: the value stands at the top-left cell, others are 0.

    An odd last row or column is padded with zeros, which count, as in the released code. Returns
    the tokens [T, N, D] and the mask [T, N] of top-left cells.
    """
    t, rows, columns = grid
    x = tokens.view(t, rows, columns, -1).permute(0, 3, 1, 2)
    x = pad(x, (0, columns % 2, 0, rows % 2))
    pooled = (avg_pool2d if kind == "avg" else max_pool2d)(x, 2)
    out = torch.zeros_like(tokens).view(t, rows, columns, -1)
    out[:, ::2, ::2] = pooled.permute(0, 2, 3, 1)
    mask = torch.zeros(t, rows, columns, dtype=torch.bool, device=tokens.device)
    mask[:, ::2, ::2] = True
    return out.view_as(tokens), mask.view(t, -1)


def entropy_mask(
    features: torch.Tensor, grid: tuple[int, int, int], share: float, merge: int = 2
) -> torch.Tensor:
    """The tokens [T, N] in which one of the patches of highest entropy lies.

    Args:
        features: [T*h*w, C], the ViT's last patch features before the merger; patches stand merge
            square by merge square, squares in raster order (their order in the ViT's windows
            undone).
        grid: (T, rows, columns) in tokens.
        share: the ``max(1, int(share * h * w))`` patches of a step whose softmax over channels has
            the largest entropy count; a token stays where one of its patches is among them.
    """
    t, rows, columns = grid
    patches = rows * columns * merge * merge
    logs = features.float().view(t, patches, -1).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    chosen = entropy.argsort(dim=-1, descending=True, stable=True)[
        :, : max(1, int(share * patches))
    ]
    mask = torch.zeros(t, patches, dtype=torch.bool, device=features.device)
    return mask.scatter_(1, chosen, True).view(t, rows * columns, merge * merge).any(-1)


@dataclass(frozen=True)
class SpatialEntropy(Scorer):
    """``entropy_mask`` of each step. ``share`` is the paper's r; it names no value. Causal."""

    share: float = 0.5
    name: str = field(default="spatial-entropy", init=False)
    gives: ClassVar[frozenset[str]] = frozenset({"mask"})
    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        assert chunk.features is not None
        squares = chunk.grid[0] * chunk.grid[1] * chunk.grid[2]
        merge = math.isqrt(chunk.features.shape[0] // squares)
        return External(mask=entropy_mask(chunk.features, chunk.grid, self.share, merge))


@dataclass(frozen=True)
class SpatialPool(Scorer):
    """Average or largest value of 2 x 2 cells at the top-left one; the other three go. Causal."""

    kind: Literal["avg", "max"] = "avg"
    name: str = field(default="spatial-pool", init=False)
    gives: ClassVar[frozenset[str]] = frozenset({"mask", "tokens"})

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        tokens, mask = pool(chunk.tokens, chunk.grid, self.kind)
        return External(tokens=tokens, mask=mask)
