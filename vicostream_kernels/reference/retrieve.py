"""The definition of retrieval: summarise blocks of keys, score them, select some, list their pages.

Nothing here waits for the device, and every output has a shape that the arguments' shapes give.
"""

from __future__ import annotations

import math

import torch

from vicostream_kernels.reference._precision import accumulate_dtype

#: Norms below this count as this, as in torch's cosine_similarity: a zero vector has cosine 0.
COSINE_EPS = 1e-8


# --- summaries ---------------------------------------------------------------------------------


def summarize_blocks(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [S,NB,G,d], count [S,NB]) or (kmin, kmax [S,NB,sub,G,d]); see the public function.

    Tokens are added one after the other, as ``rope_append`` adds them: the same bits.
    """
    dtype = accumulate_dtype(k_pages)
    pages, page_size, heads, d = k_pages.shape
    streams, blocks, width = block_pages.shape
    inf = torch.inf
    listed = (block_pages >= 0) & (block_pages < pages)
    safe = torch.where(listed, block_pages, 0).long()
    fill = torch.where(listed, page_fill.clamp(0, page_size)[safe], 0) if pages else listed.int()

    total = k_pages.new_zeros((streams, blocks, heads, d), dtype=dtype)
    kmin = k_pages.new_full((streams, blocks, sub, heads, d), inf, dtype=dtype)
    kmax = k_pages.new_full((streams, blocks, sub, heads, d), -inf, dtype=dtype)
    for m in range(width if pages else 0):
        for offset in range(page_size):
            key = k_pages[safe[:, :, m], offset].to(dtype)
            there = (fill[:, :, m] > offset)[..., None, None]
            if kind == "mean":
                total += torch.where(there, key, 0)
                continue
            part = offset * sub // page_size
            kmin[:, :, part] = torch.minimum(kmin[:, :, part], torch.where(there, key, inf))
            kmax[:, :, part] = torch.maximum(kmax[:, :, part], torch.where(there, key, -inf))
    if kind == "minmax":
        return kmin, kmax
    count = fill.sum(-1, dtype=torch.int32)
    return total / count[..., None, None], count


# --- scores ------------------------------------------------------------------------------------


def _sum_rows(terms: torch.Tensor, scope: str) -> torch.Tensor:
    """Sums products [..., G, J, d] over the heads that share a row: [..., R]."""
    if scope == "stream":
        return terms.flatten(-3).sum(-1, keepdim=True)
    if scope == "kv_head":
        return terms.flatten(-2).sum(-1)
    return terms.flatten(-3, -2).sum(-1)


def _similarity(
    query: torch.Tensor,
    summary: torch.Tensor,
    summary_max: torch.Tensor | None,
    score: str,
    scope: str,
) -> torch.Tensor:
    """query [T,H,d], one for each summary [T,NB,G,d] (or [T,NB,sub,G,d] twice) -> [T,R,NB].

    Products are taken and added element by element, row by row: a stream's bits do not depend on
    what else is in the call, as those of a matrix product would.
    """
    groups = summary.shape[-2]
    q = query.unflatten(1, (groups, -1))
    if score == "bound":
        q = q[:, None, None]
        low, high = summary[..., None, :], summary_max[..., None, :]
        parts = _sum_rows(torch.where(q >= 0, q * high, q * low), scope)
        empty = (summary > summary_max).flatten(3).any(-1)[..., None]
        best = parts.masked_fill(empty, -torch.inf).amax(2)
        return best.masked_fill(empty.all(2), torch.nan).transpose(1, 2)
    keys = summary[..., None, :]
    products = _sum_rows(q[:, None] * keys, scope)
    if score == "cosine":
        q_norm = _sum_rows(q * q, scope).sqrt().clamp_min(COSINE_EPS)
        k_norm = _sum_rows((keys * keys).expand(*products.shape[:2], *q.shape[1:]), scope).sqrt()
        products = products / (q_norm[:, None] * k_norm.clamp_min(COSINE_EPS))
    return products.transpose(1, 2)


def _attention_share(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Softmax over the valid blocks whose logit is a number; NaN stays NaN, absent becomes 0."""
    nan = logits.isnan()
    logits = logits.masked_fill(nan | ~valid, -torch.inf)
    if logits.shape[-1]:
        logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    # A running sum: its last value does not depend on how many absent blocks follow.
    shares = weights / weights.cumsum(-1)[..., -1:]
    return shares.masked_fill(nan & valid, torch.nan)


def _per_token(
    query: torch.Tensor,
    summary: torch.Tensor,
    summary_max: torch.Tensor | None,
    stream: torch.Tensor,
    valid: torch.Tensor,
    score: str,
    pool: str,
    scope: str,
    sm_scale: float | None,
) -> torch.Tensor:
    """Scores of each query token against its own stream's blocks: [Q, R, NB]."""
    groups, d = summary.shape[-2:]
    per_head = pool == "softmax"
    if sm_scale is None:
        sm_scale = 1.0 if score == "cosine" else 1 / math.sqrt(d)
    made = []
    for i in range(query.shape[0]):
        mine = stream[i : i + 1]
        one = _similarity(
            query[i : i + 1],
            summary.index_select(0, mine),
            None if summary_max is None else summary_max.index_select(0, mine),
            score,
            "query_head" if per_head else scope,
        )
        if per_head:
            one = _attention_share(one * sm_scale, valid.index_select(0, mine)[:, None])
            if scope == "stream":
                one = one.mean(1, keepdim=True)
            elif scope == "kv_head":
                one = one.unflatten(1, (groups, -1)).mean(2)
        made.append(one)
    return torch.cat(made)


def _valid(
    num_blocks: torch.Tensor | None, streams: int, blocks: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks of each stream [S] int64, which entries of [S, NB] are blocks)."""
    if num_blocks is None:
        n = torch.full((streams,), blocks, dtype=torch.int64, device=like.device)
    else:
        n = num_blocks.long().clamp(0, blocks)
    return n, torch.arange(blocks, device=like.device) < n[:, None]


def score_blocks(
    query: torch.Tensor,
    summary: torch.Tensor,
    summary_max: torch.Tensor | None = None,
    summary_count: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_blocks: torch.Tensor | None = None,
    score: str = "dot",
    pool: str = "mean",
    scope: str = "stream",
    sm_scale: float | None = None,
) -> torch.Tensor:
    """The score of every block, [S, R, NB]; -inf at and beyond ``num_blocks``."""
    dtype = accumulate_dtype(query)
    if query.dim() == 2:
        query, summary = query[:, None], summary[:, :, None]
    query, summary = query.to(dtype), summary.to(dtype)
    summary_max = None if summary_max is None else summary_max.to(dtype)
    if summary_count is not None:
        summary = summary / summary_count[..., None, None]
    streams, blocks = summary.shape[:2]
    _, valid = _valid(num_blocks, streams, blocks, query)

    tokens = query.shape[0]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(streams + 1, device=query.device)
    ends = cu_seqlens.clamp(0, tokens).long()
    if pool == "mean":
        pooled = torch.segment_reduce(query.contiguous(), "mean", offsets=ends, axis=0, unsafe=True)
        scores = _similarity(pooled, summary, summary_max, score, scope)
    else:
        rows = {"stream": 1, "kv_head": summary.shape[-2], "query_head": query.shape[1]}[scope]
        each = query.new_empty((0, rows, blocks))
        if tokens:
            place = torch.arange(tokens, device=query.device)
            stream = torch.searchsorted(ends[1:].contiguous(), place, right=True)
            stream = stream.clamp_max(streams - 1)
            each = _per_token(
                query, summary, summary_max, stream, valid, score, pool, scope, sm_scale
            )
        how = "max" if pool == "max" else "mean"
        scores = torch.segment_reduce(each, how, offsets=ends, axis=0, unsafe=True)
        scores = scores.masked_fill((ends.diff() <= 0)[:, None, None], torch.nan)
    return scores.masked_fill(~valid[:, None], -torch.inf)


# --- selection ---------------------------------------------------------------------------------


def _sum_units(x: torch.Tensor, group: int) -> torch.Tensor:
    """Sums [..., NB] over each group of adjacent blocks; the last one may be short."""
    if group == 1:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group)).sum(-1)


def _ranking(scores: torch.Tensor, forced: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Units in the order of preference: forced, by score, NaN, absent; ties by index."""
    nan = scores.isnan()
    by_score = (scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).sort(
        dim=-1, descending=True, stable=True
    )
    kind = torch.where(nan, 2, 1).masked_fill(forced, 0).masked_fill(~valid, 3)
    by_kind = kind.gather(-1, by_score.indices).sort(dim=-1, stable=True)
    return by_score.indices.gather(-1, by_kind.indices)


def select_blocks(
    scores: torch.Tensor,
    num_blocks: torch.Tensor | None,
    block_tokens: torch.Tensor | None,
    *,
    k: int | None,
    ratio: float | None,
    mass: float | None,
    token_budget: int | None,
    tokens_per_block: int | None,
    min_k: int,
    group: int,
    force_first: int,
    force_last: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_index [S,R,capacity] int32 ascending and -1 padded, count [S,R] int32)."""
    streams, rows, blocks = scores.shape
    n, valid = _valid(num_blocks, streams, blocks, scores)
    n, valid = n[:, None], valid[:, None].expand(streams, rows, blocks)

    # A unit is a group of adjacent blocks; its score is the mean of those that have one.
    numbers = valid & ~scores.isnan()
    units = _sum_units(valid.int(), group)
    if group > 1:
        total = _sum_units(torch.where(numbers, scores, 0), group)
        unit_scores = total / _sum_units(numbers.int(), group)
    else:
        unit_scores = scores
    unit = torch.arange(units.shape[-1], device=scores.device)
    exists = units > 0
    forced = (unit * group < force_first).expand(exists.shape)
    if force_last:
        forced = forced | ((unit + 1) * group > (n - force_last)[..., None])
    forced = forced & exists
    order = _ranking(unit_scores, forced, exists)

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return _sum_units(x, group).gather(-1, order)

    if k is not None:
        target = torch.full_like(n, k // group)
    elif ratio is not None:
        target = (n.double() * ratio).floor().long() // group
    elif mass is not None:
        weight = torch.where(numbers, scores, 0).clamp_min(0).double()
        if block_tokens is not None:
            weight = weight * block_tokens.clamp_min(0)[:, None]
        reached = in_order(weight).cumsum(-1)
        whole = reached[..., -1:] if blocks else reached.new_zeros((streams, rows, 1))
        target = ((reached < mass * whole).sum(-1) + 1) * (whole > 0).squeeze(-1)
    elif block_tokens is not None:
        size = torch.where(valid, block_tokens.clamp_min(0)[:, None].long(), 0)
        target = ((in_order(size).cumsum(-1) <= token_budget) & exists.gather(-1, order)).sum(-1)
    else:
        target = torch.full_like(n, token_budget // tokens_per_block // group)

    target = target.clamp_min(-(-min_k // group)).maximum(forced.sum(-1))
    target = target.clamp_max(capacity // group)
    chosen = torch.zeros_like(exists).scatter(
        -1, order, (unit < target[..., None]).expand(exists.shape)
    )
    chosen = chosen & exists
    if group > 1:
        chosen = chosen.repeat_interleave(group, dim=-1)[..., :blocks]
    chosen = chosen & valid
    return _compact(
        torch.arange(blocks, device=scores.device).expand(chosen.shape), chosen, capacity
    )


def _compact(
    values: torch.Tensor, keep: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values of each row in order, int32 [..., capacity], -1 padded, and how many."""
    place = torch.where(keep, keep.cumsum(-1) - 1, capacity).clamp_max(capacity)
    out = values.new_full((*values.shape[:-1], capacity + 1), -1, dtype=torch.int32)
    out.scatter_(-1, place, values.int())
    return out[..., :capacity].contiguous(), keep.sum(-1, dtype=torch.int32)


def topk_blocks(
    query: torch.Tensor | None,
    summary: torch.Tensor | None,
    summary_max: torch.Tensor | None,
    summary_count: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_blocks: torch.Tensor | None,
    external_score: torch.Tensor | None,
    block_tokens: torch.Tensor | None,
    score: str,
    pool: str,
    scope: str,
    sm_scale: float | None,
    **selection: int | float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block_index, count, scores); scope "stream" has no dimension for its single row."""
    if external_score is None:
        scores = score_blocks(
            query, summary, summary_max, summary_count, cu_seqlens, num_blocks,
            score, pool, scope, sm_scale,
        )  # fmt: skip
    else:
        scores = external_score.to(accumulate_dtype(external_score))
        scores = scores[:, None] if scope == "stream" else scores
        _, valid = _valid(num_blocks, scores.shape[0], scores.shape[2], scores)
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    index, count = select_blocks(scores, num_blocks, block_tokens, **selection)
    if scope == "stream":
        index, count, scores = index[:, 0], count[:, 0], scores[:, 0]
    return index, count, scores.contiguous()


# --- pages -------------------------------------------------------------------------------------


def select_pages(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> torch.Tensor:
    """See ``vicostream_kernels.select_pages``: [S, L] or [S, R, L] int32."""
    rows = block_index if block_index.dim() == 3 else block_index[:, None]
    streams, heads, chosen = rows.shape
    blocks, width = block_pages.shape[1:]
    there = (rows >= 0) & (rows < blocks)
    if blocks:
        source = torch.where(there, rows, 0).long().flatten(1)[..., None]
        pages = block_pages.gather(1, source.expand(-1, -1, width))
        pages = pages.view(streams, heads, chosen, width).masked_fill(~there[..., None], -1)
    else:
        pages = block_pages.new_full((streams, heads, chosen, width), -1)

    def every_row(listed: torch.Tensor | None) -> torch.Tensor:
        listed = block_pages.new_empty((streams, 0)) if listed is None else listed
        return listed[:, None].expand(-1, heads, -1)

    sinks, recent = every_row(sink_pages), every_row(recent_pages)
    # A page that is listed twice stays where it matters: as a sink, else as recent, else in its
    # block. So the recent pages stay in one piece, in time order, at the end.
    by_priority = torch.cat((sinks, recent, pages.flatten(2)), dim=-1).long()
    capacity = by_priority.shape[-1]
    place = torch.arange(capacity, device=rows.device)
    key, source = (by_priority * capacity + place).sort(dim=-1)
    page = key.div(max(capacity, 1), rounding_mode="floor")
    is_first = torch.ones_like(page, dtype=torch.bool)
    is_first[..., 1:] = page[..., 1:] != page[..., :-1]
    keep = torch.zeros_like(is_first).scatter(-1, source, is_first) & (by_priority >= 0)

    n_sinks, n_recent = sinks.shape[-1], recent.shape[-1]
    in_time = torch.cat(
        (place[:n_sinks], place[n_sinks + n_recent :], place[n_sinks : n_sinks + n_recent])
    )
    table, _ = _compact(by_priority[..., in_time], keep[..., in_time], capacity)
    return table if block_index.dim() == 3 else table[:, 0]


def topk_pages(
    query: torch.Tensor | None,
    summary: torch.Tensor | None,
    summary_max: torch.Tensor | None,
    summary_count: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_blocks: torch.Tensor | None,
    external_score: torch.Tensor | None,
    block_tokens: torch.Tensor | None,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
    *scoring: str | float | None,
    **selection: int | float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(page table, block_index, count, scores): ``select_pages`` of ``topk_blocks``."""
    found = topk_blocks(
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens, *scoring, **selection,
    )  # fmt: skip
    return select_pages(found[0], block_pages, sink_pages, recent_pages), *found
