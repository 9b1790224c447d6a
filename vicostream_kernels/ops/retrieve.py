"""retrieve: summarise blocks of history, choose some for a question, list their pages.

A block is a run of tokens with pages of its own (a chunk of video, a frame, a page), in time order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vicostream_kernels.ops import _retrieve
from vicostream_kernels.ops.append import KeySummary

Summary = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | KeySummary


@dataclass(frozen=True)
class TopBlocks:
    """The blocks that ``topk_blocks`` chose; R is nothing, G or H by ``scope``.

    Attributes:
        block_index: [S, (R,) K] int32, the chosen blocks in ascending (time) order, -1 padded.
        count: [S, (R)] int32, how many.
        scores: [S, (R,) NB] float32, of every block, chosen or not; NaN where a score is not a
            number, -inf at and beyond ``num_blocks``.
    """

    block_index: torch.Tensor
    count: torch.Tensor
    scores: torch.Tensor


def summarize_blocks(
    k_pages: torch.Tensor,
    block_pages: torch.Tensor,
    page_fill: torch.Tensor,
    kind: str = "mean",
    sub: int = 1,
    *,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Summarises the keys of each block, from their pages.

    ``rope_append`` keeps the same summaries, to the same bits, while a stream grows
    (``KeySummary``); this makes them afterwards, for instance of a pool of un-rotated keys.

    Args:
        k_pages: [P, B, G, d] keys of one layer; float32, float16 or bfloat16.
        block_pages: [S, NB, M] int32, the pages of each block; -1, or any page outside the pool,
            is skipped.
        page_fill: [P] int32, tokens in each page.
        kind: "mean" or "minmax".
        sub: parts per page for "minmax", 1 to B: the token at ``offset`` in its page belongs to
            part ``offset * sub // B`` of its block.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        "mean": [S, NB, G, d] float32, NaN for a block without tokens (it will rank last).
        "minmax": (kmin, kmax), each [S, NB, sub, G, d] float32; +inf and -inf for a part without
        tokens.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: mean keys as in ReKV (arXiv 2503.00540), min and max keys as in Quest (arXiv
    2406.10774), parts of a page as in LServe (arXiv 2502.14866).
    """
    first, second = _retrieve.summarize_blocks(k_pages, block_pages, page_fill, kind, sub, backend)
    return first if kind == "mean" else (first, second)


def _whole_or_sizes(block_tokens: int | torch.Tensor | None) -> tuple[Any, Any]:
    """``block_tokens`` as one number for all blocks, or as what must be a tensor of them."""
    if isinstance(block_tokens, int):
        return block_tokens, None
    if isinstance(block_tokens, torch.Tensor) or not hasattr(block_tokens, "__index__"):
        return None, block_tokens
    return block_tokens, None


def _summary_tensors(
    op: str, summary: Summary | None, score: str
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(mean or sum or kmin, kmax, count) with a leading stream dimension."""
    if isinstance(summary, KeySummary):
        names = ("kmin", "kmax") if score == "bound" else ("sum", "count")
        first, second = (getattr(summary, name) for name in names)
        if first is None or second is None:
            raise ValueError(
                f"{op}: score={score!r} needs a KeySummary with {names[0]} and {names[1]}"
            )
        if score == "bound":
            return first[None], second[None], None
        return first[None], None, second[None]
    if isinstance(summary, tuple | list):
        if len(summary) != 2:
            raise ValueError(
                f"{op}: summary must be one tensor or (kmin, kmax), got {len(summary)} parts"
            )
        return summary[0], summary[1], None
    return summary, None, None


def topk_blocks(
    query: torch.Tensor | None,
    summary: Summary | None,
    *,
    k: int | None = None,
    ratio: float | None = None,
    mass: float | None = None,
    token_budget: int | None = None,
    block_tokens: torch.Tensor | int | None = None,
    max_blocks: int | None = None,
    min_k: int = 1,
    score: str = "dot",
    pool: str = "mean",
    scope: str = "stream",
    group: int = 1,
    force_first: int = 0,
    force_last: int = 0,
    num_blocks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    external_score: torch.Tensor | None = None,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> TopBlocks:
    """Scores the blocks of each stream against its question and chooses the best ones.

    **Score.** ``scope`` says which heads choose together: all ("stream"), the query heads of a KV
    head ("kv_head"), or each query head for itself ("query_head"). The heads that choose together
    count as one concatenated vector, KV heads repeated for their query heads.

    - "dot": query . mean. "cosine": the same over the product of the norms (each at least 1e-8).
    - "bound": sum over channels of max(q * kmin, q * kmax), the largest dot product that any key of
      the block can have; the largest over its parts.

    **Pooling** of several query tokens: "mean" averages the queries before they are scored; "max"
    takes the largest score of any token; "softmax" turns the scores of each token and head into
    shares of attention over the blocks (softmax of ``sm_scale`` x score) and averages these over
    tokens and over the heads that choose together, so that the scores of a row add up to 1.

    **Choice.** Blocks are put in order: forced ones, then by score from high to low, those whose
    score is NaN last; ties by the lower index. The first ones in that order are chosen:

    - ``k``: k of them.
    - ``ratio``: floor(ratio * blocks of the stream), computed in float64.
    - ``token_budget``: as many as fit, together, in so many tokens.
    - ``mass``: the fewest whose weight reaches ``mass`` times that of all; the weight of a block is
      its score if positive, else 0, times its ``block_tokens`` if given.

    At least ``min_k`` and the forced ones, at most K. Forced blocks count in all of these numbers.

    Args:
        query: [S, D], [S, H, d], or with ``cu_seqlens`` packed [Q, D], [Q, H, d]; float32, float16
            or bfloat16. [.., D] goes with vectors of any origin, e.g. embeddings.
        summary: [S, NB, D] for query [.., D]; [S, NB, G, d] means of keys for query [.., H, d], H a
            multiple of G; (kmin, kmax), each [S, NB, sub, G, d], for "bound"; or the growing
            ``KeySummary`` of one stream (S = 1). float32, float16 or bfloat16.
        k, ratio, mass, token_budget: exactly one; k >= 1, ratio and mass in (0, 1].
        block_tokens: [S, NB] int32, or one int for all blocks, with ``token_budget``; a tensor also
            with ``mass``.
        max_blocks: K, the capacity of the output. Default: what ``k``, ``ratio`` of NB, or the
            budget by a single block size come to (``min_k`` and forced blocks if they are more); NB
            for ``mass`` and ragged budgets.
        min_k: the least number of blocks chosen, where there are so many.
        score: "dot", "cosine" or "bound".
        pool: "mean", "max" or "softmax".
        scope: "stream", "kv_head" or "query_head".
        group: adjacent blocks [i * group, (i + 1) * group) are chosen together, by the mean of
            their scores (NaN left out). Every number still counts blocks: ``k`` and ``max_blocks``
            must be multiples of ``group``; ratios and budgets are rounded down, ``min_k`` up.
        force_first, force_last: so many blocks at the start and end of the stream's are chosen in
            any case.
        num_blocks: [S] int32, the blocks each stream has; default NB. Rows beyond are never read
            for a choice.
        cu_seqlens: [S+1] int32, where each stream's tokens start in a packed query; tokens beyond
            the last are ignored. A stream without tokens scores NaN throughout.
        external_score: [S, NB], or [S, R, NB] for the other scopes, in place of query, summary and
            cu_seqlens (None).
        sm_scale: for "softmax"; default d**-0.5, and 1 for "cosine".
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        ``TopBlocks(block_index [S, (R,) K], count [S, (R)], scores [S, (R,) NB])``, R = G or H.
        A block without tokens scores NaN. Nothing waits for the device.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong. With
            VICO_CHECK=1 also num_blocks, block_tokens or cu_seqlens out of range; there blocks
            that score NaN are named in a RuntimeWarning.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: ViCoStream (arXiv 2606.19849: embeddings, cosine, k 64), ReKV (arXiv 2503.00540: means,
    dot, one choice a layer, group), Quest (arXiv 2406.10774: bound per query head), LServe (arXiv
    2502.14866: parts of pages, token budget), LiveVLM (arXiv 2505.15269: softmax, ratio), V-Rex
    (arXiv 2512.12284: mass).
    """
    first, second, count = _summary_tensors("topk_blocks", summary, score)
    whole, sizes = _whole_or_sizes(block_tokens)
    found = _retrieve.topk_blocks(
        query, first, second, count, cu_seqlens, num_blocks, external_score, sizes, score, pool,
        scope, sm_scale, k, ratio, mass, token_budget, whole, max_blocks, min_k, group,
        force_first, force_last, backend,
    )  # fmt: skip
    return TopBlocks(*found)


def select_pages(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None = None,
    recent_pages: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The page table that attention reads for a choice of blocks; no key or value is copied.

    Args:
        block_index: [S, K], [S, G, K] or [S, H, K] int32, from ``topk_blocks``: ascending; -1, or
            any index outside [0, NB), is skipped.
        block_pages: [S, NB, M] int32, the pages of each block, blocks in time order; -1 padded.
        sink_pages: [S, Ms] int32?, pages before all blocks (the system prompt); -1 padded.
        recent_pages: [S, Mr] int32?, pages after the chosen blocks (the recent window, the
            question); -1 padded.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        page_table [S, L], [S, G, L] or [S, H, L] int32 with L = Ms + K * M + Mr: sink pages, pages
        of the blocks, recent pages; each page once, -1 padded at the end. A page that several of
        them list stands where the first of (sinks, recent, blocks) has it, so that the recent pages
        stay together in their order. Goes to ``sink_window_attention`` with ``page_fill``.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong. With VICO_CHECK=1 also
            a block index out of range.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
    """
    return _retrieve.select_pages(block_index, block_pages, sink_pages, recent_pages, backend)


def topk_pages(
    query: torch.Tensor | None,
    summary: Summary | None,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None = None,
    recent_pages: torch.Tensor | None = None,
    *,
    k: int | None = None,
    ratio: float | None = None,
    mass: float | None = None,
    token_budget: int | None = None,
    block_tokens: torch.Tensor | int | None = None,
    max_blocks: int | None = None,
    min_k: int = 1,
    score: str = "dot",
    pool: str = "mean",
    scope: str = "stream",
    group: int = 1,
    force_first: int = 0,
    force_last: int = 0,
    num_blocks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    external_score: torch.Tensor | None = None,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, TopBlocks]:
    """From a question to the page table in one call: ``select_pages`` of ``topk_blocks``.

    The bits of the two, with less in between: the CUDA C++ kernels list a row's pages in the launch
    that has chosen its blocks, so that scores, choice and list are two launches.

    Args:
        query, summary: as ``topk_blocks`` has them.
        block_pages: [S, NB, M] int32, the pages of each block, -1 padded; NB as in ``summary`` or
            ``external_score``.
        sink_pages, recent_pages: [S, Ms] and [S, Mr] int32?, as ``select_pages`` has them.
        k, ratio, mass, token_budget, block_tokens, max_blocks, min_k, score, pool, scope, group,
            force_first, force_last, num_blocks, cu_seqlens, external_score, sm_scale: as
            ``topk_blocks`` has them.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (page_table [S, (R,) Ms + K * M + Mr] int32, ``TopBlocks``), R = G or H by ``scope``.
        Nothing waits for the device.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is wrong; with
            VICO_CHECK=1 more, as for ``topk_blocks``.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).
    """
    first, second, count = _summary_tensors("topk_pages", summary, score)
    whole, sizes = _whole_or_sizes(block_tokens)
    table, *found = _retrieve.topk_pages(
        query, first, block_pages, sink_pages, recent_pages, second, count, cu_seqlens,
        num_blocks, external_score, sizes, score, pool, scope, sm_scale, k, ratio, mass,
        token_budget, whole, max_blocks, min_k, group, force_first, force_last, backend,
    )  # fmt: skip
    return table, TopBlocks(*found)
