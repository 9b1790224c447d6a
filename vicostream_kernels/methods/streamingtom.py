"""StreamingTOM (arXiv 2510.18269): a step has one budget, split by change; groups by mean key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vicostream_kernels.methods.prune_rules import STREAMINGTOM
from vicostream_kernels.methods.rules import EngineRule, Method, RetrieveRule
from vicostream_kernels.methods.scorer import External, ScoredChunk, Scorer

STATIC, DYNAMIC, BROKEN = 0, 1, 2


@dataclass(frozen=True)
class StaticDynamic(Scorer):
    """Static tokens (cosine with the same place one step before above ``tau``) and dynamic ones
    share ``budget`` tokens of a step in proportion to their numbers; in both, saliency decides.

    Of N tokens with S static ones, ``budget * S // N`` static ones stay and the rest of the budget
    is dynamic. Without a step before all are dynamic. The saliency is the attention that a token
    receives from its step's tokens (softmax of their scaled products): the publication takes the
    ViT's own attention, and merges static tokens by clustering where we keep the most salient.
    Tokens with NaN or inf all stay, of the budget as far as it goes. Causal.
    """

    tau: float = 0.9
    budget: int = 50
    name: str = field(default="static-dynamic", init=False)
    gives: ClassVar[frozenset[str]] = frozenset({"score", "groups"})

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau} is outside [-1, 1], the values of a cosine")
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1 token")

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        before: torch.Tensor | None = state.get("previous")
        scores, groups, quotas = [], [], []
        for step in chunk.tokens.float():
            # One step at a time, so that the cut of a stream into chunks shows in no bit.
            whole = step.isfinite().all(-1)
            step = torch.where(whole[:, None], step, 0.0)
            static = torch.zeros(len(step), dtype=torch.bool, device=step.device)
            if before is not None:
                static = torch.nn.functional.cosine_similarity(before, step, dim=-1) > self.tau
            # A quota by numbers would leave some broken ones out.
            broken = (~whole).sum()
            left = (self.budget - broken).clamp(min=0)
            of_static = left * (static & whole).sum() // whole.sum().clamp(min=1)
            quotas.append(torch.stack((of_static, left - of_static, broken)))
            groups.append(torch.where(whole, torch.where(static, STATIC, DYNAMIC), BROKEN))
            attention = torch.softmax(step @ step.T * step.shape[-1] ** -0.5, -1)
            scores.append(torch.where(whole, attention.mean(0), torch.nan))
            before = step
        state["previous"] = before.clone()
        return External(
            score=torch.stack(scores),
            group_ids=torch.stack(groups).int(),
            group_k=torch.stack(quotas).int(),
        )


#: Groups of one step's 50 tokens by the cosine of their mean key, as cached, with the mean query.
#: Neither heads nor layers are said to choose apart or together: each layer does, for all heads.
GROUPS = RetrieveRule(
    summary="mean_key",
    layers="each",
    score="cosine",
    k=None,
    token_budget=12_544,
)

#: Without the 4-bit pages. The budget is that of one reimplementation.
STREAMINGTOM_METHOD = Method(
    name="streamingtom",
    source="StreamingTOM, arXiv 2510.18269; temporal reduction and group retrieval",
    prune=STREAMINGTOM,
    scorer=StaticDynamic(),
    retrieve=GROUPS,
    engine=EngineRule(pixels=196 * 28 * 28, frames_per_chunk=2),
)
