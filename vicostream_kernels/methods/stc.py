"""STC-Pruner (arXiv 2512.00891) with its history as the released code keeps it.

There the channels are chosen anew for each chunk, ordered by variance, and the means of past chunks
are averaged place by place: over different channels. ``STC_GAUSSIAN_PER_CHUNK`` keeps the history
over all channels instead. Use this only to compare with published figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vicostream_kernels.methods.scorer import External, ScoredChunk, Scorer


@dataclass(frozen=True)
class AsReleased(Scorer):
    """The released score; the smallest are kept. Not causal: channels and history go by chunk.
    Tokens with NaN or inf are in no mean and come first.

    Attributes:
        form: "gaussian" (the released strategy) or "dual_anchor" (the paper's formula, as
            similarity: its largest distances are our smallest scores).
        alpha: share of the history in the dual-anchor form.
        channel_share: share of channels that is compared, those that vary least.
    """

    form: Literal["gaussian", "dual_anchor"] = "gaussian"
    alpha: float = 0.5
    channel_share: float = 0.5
    name: str = field(default="stc-as-released", init=False)
    gives: ClassVar[frozenset[str]] = frozenset({"score"})

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        x = chunk.tokens.float()
        whole = x.isfinite().all(-1, keepdim=True)
        x = torch.where(whole, x, 0.0)
        tokens = whole.sum((0, 1)).clamp_min(1)
        spread = torch.where(whole, x - x.sum((0, 1)) / tokens, 0.0).square().sum((0, 1))
        width = max(1, int(x.shape[-1] * self.channel_share))
        x = x.index_select(-1, spread.argsort(stable=True)[:width])
        # A running mean: the released list of all past means grows without end.
        count = state["count"] = state.get("count", 0) + 1
        mean, past = x.sum((0, 1)) / tokens, state.get("mean")
        state["mean"] = mean if past is None else past + (mean - past) / count
        temporal = normalize(state["mean"], dim=-1)
        unit = normalize(x, dim=-1)
        if self.form == "gaussian":
            spatial = unit.sum(1, keepdim=True) / whole.sum(1, keepdim=True).clamp_min(1)
            score = _gaussians(unit - temporal) + _gaussians(unit - spatial)
        else:
            spatial = normalize(x.sum(1, keepdim=True), dim=-1)
            score = self.alpha * (unit * temporal).sum(-1)
            score = score + (1 - self.alpha) * (unit * spatial).sum(-1)
        return External(score=torch.where(whole[..., 0], score, torch.nan))


def _gaussians(difference: torch.Tensor) -> torch.Tensor:
    distance = difference.square().sum(-1)
    return sum((-distance / 2.0 ** (k + 1)).exp() for k in range(-3, 2))
