"""retrieve in Triton: the launches.

The functions have the semantics of the raw ops of `vicostream_kernels.ops.retrieve`, which holds
the contract and checks the arguments. Scores, keys and lists are kernels; the best keys are found
by torch's own top-k (or its sort, where the rule walks all blocks in order): keys are unique
integers, so any top-k gives the same ones. Nothing here waits for the device.
"""

import math
import struct

import torch

from vicostream_kernels.triton_kernels._compact import TILE, list_kernel
from vicostream_kernels.triton_kernels._launch import cdiv, on, power_of_2, strides
from vicostream_kernels.triton_kernels._retrieve_pages import pages_kernel
from vicostream_kernels.triton_kernels._retrieve_score import (
    average_kernel,
    queries_kernel,
    score_kernel,
    shares_kernel,
)
from vicostream_kernels.triton_kernels._retrieve_select import (
    keys_kernel,
    pick_kernel,
    reach_kernel,
)
from vicostream_kernels.triton_kernels._retrieve_summary import summary_kernel

# (elements of a tile of summaries, warps): the loads of a tile are in flight at once, as many as
# there are registers for: norms are summed beside the products, and bounds are two tiles.
_TILES = {"dot": (4096, 4), "bound": (4096, 8), "cosine": (2048, 4)}


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _bits(value: float | None) -> int:
    """A float64 as the integer of its bits: a kernel's float arguments are float32."""
    return 0 if value is None else struct.unpack("<q", struct.pack("<d", value))[0]


def summarize_blocks(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [S,NB,G,d], count [S,NB]) or (kmin, kmax [S,NB,sub,G,d]); one launch.

    k_pages [P,B,G,d], block_pages [S,NB,M] int32, page_fill [P] int32; any strides.
    """
    pages, page_size, heads, d = k_pages.shape
    streams, blocks, listed = block_pages.shape
    f32 = dict(dtype=torch.float32, device=k_pages.device)
    mean = count = kmin = kmax = None
    if kind == "mean":
        mean = torch.empty((streams, blocks, heads, d), **f32)
        count = torch.empty((streams, blocks), dtype=torch.int32, device=k_pages.device)
    else:
        kmin, kmax = (torch.empty((streams, blocks, sub, heads, d), **f32) for _ in range(2))
    programs = streams * blocks * sub * heads
    if programs:
        with on(k_pages):
            summary_kernel[(programs,)](
                k_ptr=k_pages,
                table_ptr=block_pages,
                fill_ptr=page_fill,
                mean_ptr=mean,
                count_ptr=count,
                kmin_ptr=kmin,
                kmax_ptr=kmax,
                pages=pages,
                page_size=page_size,
                blocks=blocks,
                listed=listed,
                heads=heads,
                parts=sub,
                **strides(k_pages, "k", "pbhd"),
                **strides(block_pages, "table", "snm"),
                **strides(page_fill, "fill", "p"),
                HEAD_DIM=d,
                CHANNELS=power_of_2(d),
                UNROLL=8,
                num_warps=1,
                enable_fp_fusion=True,
            )
    elif count is not None:
        count.zero_()
    return (mean, count) if kind == "mean" else (kmin, kmax)


def _score_blocks(
    query: torch.Tensor,
    summary: torch.Tensor,
    summary_max: torch.Tensor | None,
    summary_count: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_blocks: torch.Tensor | None,
    score: str,
    pool: str,
    scope: str,
    sm_scale: float | None,
) -> torch.Tensor:
    """The score of every block, [S, R, NB] float32."""
    device = query.device
    f32 = dict(dtype=torch.float32, device=device)
    streams, blocks = summary.shape[:2]
    tokens = query.shape[0]
    parts = summary.shape[2] if score == "bound" else 1
    if query.dim() == 2:
        total = query.shape[1]
        chunk = min(1024, max(16, power_of_2(total)))
        step, chunks, heads, kv_heads = chunk, cdiv(total, chunk), 1, 1
        query_strides = (query.stride(0), chunk * query.stride(1), 0, query.stride(1))
        summary_strides = (*summary.stride()[:2], 0, chunk * summary.stride(2), summary.stride(2))
    else:
        kv_heads, step = summary.shape[-2:]
        chunk = max(16, power_of_2(step))
        total, chunks, heads = kv_heads * step, kv_heads, query.shape[1] // kv_heads
        by_token, by_head, by_channel = query.stride()
        query_strides = (by_token, heads * by_head, by_head, by_channel)
        part_stride = summary.stride(2) if score == "bound" else 0
        summary_strides = (*summary.stride()[:2], part_stride, *summary.stride()[-2:])
    if summary_max is not None and summary_max.stride()[-2:] != summary.stride()[-2:]:
        summary_max = summary_max.clone(memory_format=torch.contiguous_format)
        summary = summary.clone(memory_format=torch.contiguous_format)
        summary_strides = summary.stride()

    # Softmax is taken of each head's scores; its rows are all heads.
    per_head = pool == "softmax" or scope == "query_head"
    whole = scope == "stream" and pool != "softmax"
    rows = heads if per_head else 1
    units = streams if pool == "mean" else tokens
    planes = 2 if score == "bound" else 1
    if pool == "softmax":
        scores = torch.empty((tokens, chunks * rows, blocks), **f32)
    else:
        scores = torch.empty((streams, 1 if whole else chunks * rows, blocks), **f32)
    vectors = torch.empty((units, chunks, rows, planes, chunk), **f32)
    norms = torch.empty((units, chunks, rows), **f32)
    elements, warps = _TILES[score]
    tile = max(1, elements // chunk)
    tiles = cdiv(blocks, tile)
    common = dict(STEP=step, CHUNK=chunk)
    with on(query):
        if units:
            queries_kernel[(units * chunks,)](
                query_ptr=query,
                cu_seqlens_ptr=cu_seqlens,
                vectors_ptr=vectors,
                norms_ptr=norms,
                tokens=tokens,
                chunks=chunks,
                heads=heads,
                total=total,
                query_stride_t=query_strides[0],
                query_stride_chunk=query_strides[1],
                query_stride_h=query_strides[2],
                query_stride_d=query_strides[3],
                cu_stride=_stride(cu_seqlens),
                POOLED=pool == "mean",
                SUMMED=not per_head,
                BOUND=score == "bound",
                num_warps=4,
                enable_fp_fusion=True,
                **common,
            )
        programs = streams * tiles * (1 if whole else chunks)
        if programs:
            score_kernel[(programs,)](
                summary_ptr=summary,
                summary_max_ptr=summary_max,
                count_ptr=summary_count,
                vectors_ptr=vectors,
                norms_ptr=norms,
                cu_seqlens_ptr=cu_seqlens,
                num_blocks_ptr=num_blocks,
                scores_ptr=scores,
                tokens=tokens,
                blocks=blocks,
                tiles=tiles,
                chunks=chunks,
                rows=rows,
                parts=parts,
                total=total,
                repeats=float(1 if per_head else heads),
                summary_stride_s=summary_strides[0],
                summary_stride_n=summary_strides[1],
                summary_stride_part=summary_strides[2],
                summary_stride_chunk=summary_strides[3],
                summary_stride_d=summary_strides[4],
                summary_max_stride_s=0 if summary_max is None else summary_max.stride(0),
                summary_max_stride_n=0 if summary_max is None else summary_max.stride(1),
                summary_max_stride_part=0 if summary_max is None else summary_max.stride(2),
                **strides(summary_count, "count", "sn"),
                cu_stride=_stride(cu_seqlens),
                num_blocks_stride=_stride(num_blocks),
                SCORE=score,
                POOL=pool,
                WHOLE=whole,
                BLOCKS=tile,
                num_warps=warps,
                enable_fp_fusion=True,
                **common,
            )
    if pool != "softmax":
        return scores
    if sm_scale is None:
        sm_scale = 1.0 if score == "cosine" else 1 / math.sqrt(step if query.dim() == 3 else total)
    return _average_shares(scores, cu_seqlens, num_blocks, streams, kv_heads, scope, sm_scale)


def _average_shares(
    logits: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    num_blocks: torch.Tensor | None,
    streams: int,
    kv_heads: int,
    scope: str,
    scale: float,
) -> torch.Tensor:
    """Logits [Q, H, NB] -> the mean share of attention of the rows' tokens and heads [S, R, NB]."""
    tokens, heads, blocks = logits.shape
    rows = {"stream": 1, "kv_head": kv_heads, "query_head": heads}[scope]
    f32 = dict(dtype=torch.float32, device=logits.device)
    # Each of its own, aligned: kernels are compiled for the alignment of what they are given.
    peaks, sums = (torch.empty((tokens, heads), **f32) for _ in range(2))
    scores = torch.empty((streams, rows, blocks), **f32)
    tile = 256
    tiles = cdiv(blocks, tile)
    with on(logits):
        if tokens and blocks:
            shares_kernel[(tokens * heads,)](
                logits_ptr=logits,
                peaks_ptr=peaks,
                sums_ptr=sums,
                blocks=blocks,
                scale=scale,
                TILE=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
        if scores.numel():
            average_kernel[(streams * rows * tiles,)](
                logits_ptr=logits,
                peaks_ptr=peaks,
                sums_ptr=sums,
                cu_seqlens_ptr=cu_seqlens,
                num_blocks_ptr=num_blocks,
                scores_ptr=scores,
                tokens=tokens,
                rows=rows,
                heads=heads // rows,
                blocks=blocks,
                tiles=tiles,
                scale=scale,
                cu_stride=_stride(cu_seqlens),
                num_blocks_stride=_stride(num_blocks),
                TILE=tile,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return scores


def _select_blocks(
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
    i32 = dict(dtype=torch.int32, device=scores.device)
    index = torch.empty((streams, rows, capacity), **i32)
    count = torch.empty((streams, rows), **i32)
    units = cdiv(blocks, group)
    if streams * rows * units * capacity == 0:
        return index.fill_(-1), count.zero_()
    keys = torch.empty((streams, rows, units), dtype=torch.int64, device=scores.device)
    limits = dict(num_blocks_ptr=num_blocks, num_blocks_stride=_stride(num_blocks))
    sizes = dict(rows=rows, blocks=blocks, group=group)
    by_walk = mass is not None or block_tokens is not None
    target = None
    with on(scores):
        tiles = cdiv(units, 256)
        keys_kernel[(streams * rows * tiles,)](
            scores_ptr=scores,
            keys_ptr=keys,
            units=units,
            tiles=tiles,
            first=force_first,
            last=force_last,
            TILE=256,
            num_warps=4,
            enable_fp_fusion=True,
            **limits,
            **sizes,
        )
        if by_walk:
            keys = keys.sort(-1, descending=True).values
            target = torch.empty((streams, rows), **i32)
            reach_kernel[(streams * rows,)](
                keys_ptr=keys,
                scores_ptr=scores,
                sizes_ptr=block_tokens,
                target_ptr=target,
                units=units,
                budget=token_budget or 0,
                mass_bits=_bits(mass),
                **strides(block_tokens, "sizes", "sn"),
                MASS=mass is not None,
                TILE=512,
                num_warps=4,
                enable_fp_fusion=True,
                **limits,
                **sizes,
            )
        else:
            keys = keys.topk(min(capacity // group, units), -1).values
        kept = keys.shape[-1]
        # Each tile of units also writes the padding of its share of the list.
        tiles = cdiv(max(kept, cdiv(capacity, group)), TILE)
        known = k if k is not None else (token_budget or 0) // (tokens_per_block or 1)
        pick_kernel[(streams * rows * tiles,)](
            keys_ptr=keys,
            target_ptr=target,
            index_ptr=index,
            count_ptr=count,
            kept=kept,
            tiles=tiles,
            capacity=capacity,
            target=known // group,
            ratio_bits=_bits(ratio),
            least=cdiv(min_k, group),
            first=force_first,
            last=force_last,
            RATIO=ratio is not None,
            TILE=TILE,
            OTHERS=64,
            num_warps=4,
            enable_fp_fusion=True,
            **limits,
            **sizes,
        )
    return index, count


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
    """(block_index, count, scores); scope "stream" has no dimension for its single row.

    The arguments are those of the raw op `vicostream::topk_blocks`; any strides. Without a walk
    over all blocks (`mass`, ragged budgets) it is four launches and torch's top-k.
    """
    if external_score is None:
        scores = _score_blocks(
            query, summary, summary_max, summary_count, cu_seqlens, num_blocks, score, pool, scope,
            sm_scale,
        )  # fmt: skip
    else:
        given = external_score[:, None] if scope == "stream" else external_score
        scores = given.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if num_blocks is not None:
            place = torch.arange(scores.shape[-1], device=scores.device)
            scores.masked_fill_(place >= num_blocks[:, None, None], -torch.inf)
    index, count = _select_blocks(scores, num_blocks, block_tokens, **selection)
    if scope == "stream":
        return index[:, 0], count[:, 0], scores[:, 0]
    return index, count, scores


def select_pages(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> torch.Tensor:
    """The page table [S, L] or [S, R, L] int32 of chosen blocks, in two launches; any strides."""
    index = block_index if block_index.dim() == 3 else block_index[:, None]
    streams, heads, chosen = index.shape
    blocks, width = block_pages.shape[1:]
    chosen = chosen if width else 0  # blocks without pages list nothing
    sinks, recent = (0 if x is None else x.shape[1] for x in (sink_pages, recent_pages))
    length = sinks + chosen * width + recent
    i32 = dict(dtype=torch.int32, device=index.device)
    table = torch.empty((*block_index.shape[:-1], length), **i32)
    rows, tiles = streams * heads, cdiv(length, TILE)
    if rows * length == 0:
        return table
    values, listed = torch.empty((rows, length), **i32), torch.empty((rows, tiles), **i32)
    with on(index):
        pages_kernel[(rows * tiles,)](
            index_ptr=index,
            pages_ptr=block_pages,
            sinks_ptr=sink_pages,
            recent_ptr=recent_pages,
            values_ptr=values,
            listed_ptr=listed,
            heads=heads,
            length=length,
            tiles=tiles,
            sinks=sinks,
            chosen=chosen,
            recent=recent,
            blocks=blocks,
            width=max(width, 1),
            **strides(index, "index", "srk"),
            **strides(block_pages, "pages", "snm"),
            **strides(sink_pages, "sinks", "sm"),
            **strides(recent_pages, "recent", "sm"),
            TILE=TILE,
            OTHERS=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
        list_kernel[(rows * tiles,)](
            values_ptr=values,
            listed_ptr=listed,
            changed_ptr=None,
            out_ptr=table,
            count_ptr=None,
            length=length,
            tiles=tiles,
            capacity=length,
            TILE=TILE,
            SCAN=64,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return table


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
    """(page table, block_index, count, scores): the launches of `topk_blocks`, then those of
    `select_pages`."""
    found = topk_blocks(
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens, *scoring, **selection,
    )  # fmt: skip
    return select_pages(found[0], block_pages, sink_pages, recent_pages), *found
