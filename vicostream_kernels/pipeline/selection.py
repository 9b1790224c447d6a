"""Which blocks of the history a question reads: the one place where that is decided.

A method's ``RetrieveRule`` is one `Selector`; an evaluation passes its own (an oracle, chance) to
``Stream.ask(selector=...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from vicostream_kernels._blocks import to_device
from vicostream_kernels.cache import Block
from vicostream_kernels.methods import RetrieveRule
from vicostream_kernels.ops.retrieve import Summary, TopBlocks, topk_blocks, topk_pages


@dataclass(frozen=True)
class Rows:
    """What a question may choose from, in time order: the chunks that ended at or before its time,
    or their pages. NB rows.

    Attributes:
        blocks: the chunk of each row (``start_s``, ``end_s``); with pages several rows share one.
        tokens: video tokens of each row.
        pages: [1, NB, M] int32, the pages of each row, -1 padded.
    """

    blocks: tuple[Block, ...]
    tokens: tuple[int, ...]
    pages: torch.Tensor

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Asked:
    """What a selector goes by.

    Attributes:
        rows: the candidates.
        time_s: when the question is asked, seconds of the stream.
        layer: the layer that asks, None where one choice serves them all.
        step: 0 while the prompt is read; n when the n-th token of the answer is.
        query: [1, D], the mean input embedding of the prompt, where ``layer`` is None; else
            [n, H, d], that layer's queries of the asking tokens, rotated or not as the summary is.
        summary: the rows' summaries as ``topk_blocks`` takes them; None where the method keeps
            none that the query could be compared to.
    """

    rows: Rows
    time_s: float
    layer: int | None
    step: int
    query: torch.Tensor
    summary: Summary | None


class Selector(Protocol):
    """Decides what a question reads.

    ``per_layer`` (False where it is missing): whether layers ask, each with its own queries and
    summaries (all of them, or one for all, as the rule has it). Else one choice is made for all of
    them before the prompt is read, by embeddings.
    """

    per_layer: bool

    def select(self, asked: Asked) -> TopBlocks:
        """The chosen rows, as ``topk_blocks`` returns them for one stream: one list of rows, or one
        for each KV head or query head. Called only where there are rows; a row number outside
        [0, NB) is skipped."""
        ...


# Of what the best lies above the median, how much a relevant block does at least.
_SHARE_OF_BEST = 0.1
# Of the range of all scores, by how much two in a row differ at most that are of one scene.
_STILL = 0.01
_AMOUNTS = ("k", "ratio", "mass", "token_budget", "block_tokens")


class RuleSelector:
    """A method's rule, by ``topk_blocks``, or with the list of its pages by ``topk_pages``."""

    def __init__(self, rule: RetrieveRule, page_size: int, backend: str = "auto") -> None:
        self._kwargs, self._backend = rule.kwargs(), backend
        self._budget = rule.token_budget is not None
        self._relevant = rule.relevant
        # A page counts whole, so that a budget is a number of pages, whatever they hold.
        self._row_tokens = page_size if rule.unit == "page" else None
        self.per_layer = rule.summary != "embedding"

    def select(self, asked: Asked) -> TopBlocks:
        query, summary, kwargs, scores = self._question(asked)
        return _reported(topk_blocks(query, summary, **kwargs), scores)

    def select_pages(
        self, asked: Asked, sink_pages: torch.Tensor, recent_pages: torch.Tensor
    ) -> tuple[torch.Tensor, TopBlocks]:
        """The same choice and the page table of it, between pages [1, Ms] and [1, Mr]."""
        query, summary, kwargs, scores = self._question(asked)
        table, chosen = topk_pages(
            query, summary, asked.rows.pages, sink_pages, recent_pages, **kwargs
        )
        return table, _reported(chosen, scores)

    def _question(
        self, asked: Asked
    ) -> tuple[torch.Tensor | None, Summary | None, dict[str, Any], torch.Tensor | None]:
        """What ``topk_blocks`` is asked: query, summary and the rest; and the scores to report
        where it is given others."""
        kwargs, query = {**self._kwargs, "backend": self._backend}, asked.query
        if self._budget:
            kwargs["block_tokens"] = self._row_tokens or to_device(
                asked.rows.tokens, torch.int32, query.device
            ).unsqueeze(0)
        if query.dim() == 3:
            kwargs["cu_seqlens"] = to_device((0, len(query)), torch.int32, query.device)
        if self._relevant is None:
            return query, asked.summary, kwargs, None
        # A call for the scores alone: torch ranks them, which no kernel does, before the choice.
        scored = {n: v for n, v in kwargs.items() if n not in _AMOUNTS}
        scored["k"] = kwargs["group"]
        scores = topk_blocks(query, asked.summary, **scored).scores
        kwargs.pop("cu_seqlens", None)
        kwargs["external_score"] = _newest_relevant(scores, self._relevant)
        return None, None, kwargs, scores


def _reported(chosen: TopBlocks, scores: torch.Tensor | None) -> TopBlocks:
    return chosen if scores is None else replace(chosen, scores=scores)


def _newest_relevant(scores: torch.Tensor, spread: float) -> torch.Tensor:
    """Ranks [..., NB] for scores [..., NB]: relevant blocks by age and above all others, which keep
    their order; what is not a number stays so."""
    count = scores.shape[-1]
    known = ~scores.isnan()
    best = scores.where(known, -torch.inf).amax(dim=-1, keepdim=True)
    worst = scores.where(known, torch.inf).amin(dim=-1, keepdim=True)
    # A scene that stands still counts once: an hour of it would be the median, from which all else
    # stands out.
    still = scores.diff(dim=-1).abs() <= _STILL * (best - worst)
    moved = torch.cat((scores[..., :1], scores[..., 1:].masked_fill(still, torch.nan)), dim=-1)
    middle = _median(moved)
    limit = middle + spread * _median((moved - middle).abs())
    limit = torch.maximum(limit, middle + _SHARE_OF_BEST * (best - middle))
    age = torch.arange(count, dtype=torch.float32, device=scores.device)
    # By place, not by size: scores of any scale, and infinite ones.
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    ranks = torch.where(scores >= limit, count + age, rank)
    return ranks.masked_fill(scores.isnan(), torch.nan)


def _median(values: torch.Tensor) -> torch.Tensor:
    """The lower middle of the numbers along the last axis, kept as an axis of one. From a sort:
    ``nanmedian`` has no deterministic form on a GPU."""
    ordered = values.sort(dim=-1).values  # NaN last
    middle = (~ordered.isnan()).sum(dim=-1, keepdim=True).sub(1).clamp(min=0) // 2
    return ordered.gather(-1, middle)


def chosen_rows(
    rows: Sequence[int], candidates: Rows, scores: torch.Tensor | None = None
) -> TopBlocks:
    """A choice made by other means: distinct row numbers in any order, and [NB] scores if any."""
    device = candidates.pages.device
    index = torch.tensor([sorted(rows)], dtype=torch.int32, device=device)
    if scores is None:
        scores = torch.full((len(candidates),), torch.nan)
    count = torch.tensor([len(rows)], dtype=torch.int32, device=device)
    return TopBlocks(index, count, scores.to(device, torch.float32).view(1, -1))
