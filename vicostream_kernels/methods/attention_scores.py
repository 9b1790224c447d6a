"""Scores from attention and from trained heads, for rules with an external score.

The engine's kernels do not give attention weights away: these serve callers that have queries and
keys, or a trained head, at hand.
"""

from __future__ import annotations

import torch


def attention_received(q: torch.Tensor, k: torch.Tensor, sm_scale: float | None = None):
    """How much attention each key gets: the mean over heads and queries of its softmax weight.

    As miniReranker (arXiv 2606.10759) scores visual tokens by the embedder's attention, and
    UTPTrack (2602.23734) by that of the static template's centre token (one query).

    Args:
        q: [H, Q, d] queries. k: [H, N, d] keys; heads are repeated by the caller where they group.
        sm_scale: what products are multiplied with; None is ``d ** -0.5``.

    Returns float32 [N]; the sum is 1. A key with NaN or inf (in any head) gets NaN, which rules
    keep, and takes no attention from others; queries with such are left out.
    """
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    q, k = q.float(), k.float()
    asks, whole = q.isfinite().all(-1, keepdim=True), k.isfinite().all(-1).all(0)
    products = q.where(asks, 0.0) @ k.where(whole[:, None], 0.0).mT * scale
    weights = torch.softmax(products.masked_fill(~whole, -torch.inf), -1)
    received = weights.where(asks, 0.0).sum((0, 1)) / asks.sum()
    return received.masked_fill(~whole, torch.nan)


def linear_score(x: torch.Tensor, weight: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
    """A trained linear head over tokens [T, N, D] with ``weight`` [D]: float32 [T, N].

    VideoLLM-MoD's layer expert (arXiv 2408.16730) is one for each layer that routes. A token with
    NaN or inf gets NaN, which rules keep: an infinite score could be the lowest.
    """
    score = x.float() @ weight.float() + bias
    return score.masked_fill(~x.isfinite().all(-1), torch.nan)


def type_ids(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """``group_ids`` [1, N] int32 of tokens that stand type by type, ``lengths`` of each: UTPTrack's
    search region, dynamic and static template."""
    types = torch.arange(len(lengths), dtype=torch.int32, device=device)
    return types.repeat_interleave(torch.tensor(lengths, device=device))[None]
