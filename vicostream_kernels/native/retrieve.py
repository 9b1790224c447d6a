"""summarize_blocks, topk_blocks and select_pages in C++ (CPU)."""

from __future__ import annotations

import torch

from vicostream_kernels.backends import native

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SCORES = {"dot": 0, "cosine": 1, "bound": 2}
_POOLS = {"mean": 0, "max": 1, "softmax": 2}
_SCOPES = {"stream": 0, "kv_head": 1, "query_head": 2}


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _packed(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def summarize_blocks_cpu(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.summarize_blocks``; ``torch.get_num_threads()`` threads."""
    k_pages, block_pages, page_fill = _dense(k_pages), block_pages.contiguous(), _packed(page_fill)
    (streams, blocks, width), (heads, d) = block_pages.shape, k_pages.shape[2:]
    if kind == "mean":
        first = torch.empty((streams, blocks, heads, d))
        second = torch.empty((streams, blocks), dtype=torch.int32)
    else:
        first, second = (torch.empty((streams, blocks, sub, heads, d)) for _ in range(2))
    high, count = (0, second.data_ptr()) if kind == "mean" else (second.data_ptr(), 0)
    native()[0].summarize_blocks_cpu(
        _DTYPES[k_pages.dtype],
        d,
        (
            k_pages.data_ptr(), block_pages.data_ptr(), page_fill.data_ptr(), first.data_ptr(),
            high, count,
        ),
        (*k_pages.shape[:3], streams * blocks, width, sub),
        k_pages.stride()[:3],
        torch.get_num_threads(),
    )  # fmt: skip
    return first, second


def _score_blocks(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, score, pool, scope, sm_scale
) -> torch.Tensor:  # fmt: skip
    """[S, R, NB] float32; what lies beyond ``num_blocks`` is not written."""
    query, summary = _dense(query), _dense(summary)
    summary_max = None if summary_max is None else _dense(summary_max)
    summary_count = None if summary_count is None else _dense(summary_count)
    if query.dim() == 2:  # plain vectors: one head
        query, summary = query[:, None], summary[:, :, None]
    if summary.dim() == 4:  # one part
        summary = summary[:, :, None]
    tokens, heads, d = query.shape
    streams, blocks, sub, kv_heads, _ = summary.shape
    rows = {"stream": 1, "kv_head": kv_heads, "query_head": heads}[scope]
    if sm_scale is None:
        sm_scale = 1.0 if score == "cosine" else d**-0.5
    scores = torch.empty((streams, rows, blocks))
    native()[0].score_blocks_cpu(
        (
            _DTYPES[query.dtype], _DTYPES[summary.dtype], _SCORES[score], _POOLS[pool],
            _SCOPES[scope],
        ),
        sm_scale,
        (
            query.data_ptr(), summary.data_ptr(), _address(summary_max), _address(summary_count),
            _address(cu_seqlens), _address(num_blocks), scores.data_ptr(),
        ),
        (tokens, heads, kv_heads, d, streams, blocks, sub),
        query.stride()[:2],
        summary.stride()[:4],
        (0, 0, 0, 0) if summary_max is None else summary_max.stride()[:4],
        0 if summary_count is None else summary_count.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return scores


def topk_blocks_cpu(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, score, pool, scope, sm_scale, *, k, ratio, mass, token_budget, tokens_per_block,
    min_k, group, force_first, force_last, capacity,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See ``vicostream_kernels.topk_blocks``; ``torch.get_num_threads()`` threads."""
    num_blocks, block_tokens = _packed(num_blocks), _packed(block_tokens)
    if external_score is None:
        scores = _score_blocks(
            query, summary, summary_max, summary_count, _packed(cu_seqlens), num_blocks,
            score, pool, scope, sm_scale,
        )  # fmt: skip
    else:
        scores = torch.empty(external_score.shape).copy_(external_score)
        scores = scores[:, None] if scope == "stream" else scores
    streams, rows, blocks = scores.shape
    if ratio is not None:
        rule, amount, target = 1, ratio, 0
    elif mass is not None:
        rule, amount, target = 2, mass, 0
    elif block_tokens is not None:
        rule, amount, target = 3, 0.0, token_budget
    else:
        rule, amount, target = 0, 0.0, k if k is not None else token_budget // tokens_per_block
    index = torch.empty((streams, rows, capacity), dtype=torch.int32)
    count = torch.empty((streams, rows), dtype=torch.int32)
    native()[0].select_blocks_cpu(
        rule,
        amount,
        (
            scores.data_ptr(), _address(num_blocks), _address(block_tokens), index.data_ptr(),
            count.data_ptr(),
        ),
        (
            streams, rows, blocks, capacity, target, min_k, group,
            min(force_first, blocks), min(force_last, blocks),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    if scope == "stream":
        return index[:, 0], count[:, 0], scores[:, 0]
    return index, count, scores


def select_pages_cpu(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> torch.Tensor:
    """See ``vicostream_kernels.select_pages``; ``torch.get_num_threads()`` threads."""
    block_index, block_pages = block_index.contiguous(), block_pages.contiguous()
    sink_pages, recent_pages = _packed(sink_pages), _packed(recent_pages)
    streams, blocks, width = block_pages.shape
    *rows, chosen = block_index.shape
    sinks = 0 if sink_pages is None else sink_pages.shape[1]
    recent = 0 if recent_pages is None else recent_pages.shape[1]
    length = sinks + chosen * width + recent
    table = torch.empty((*rows, length), dtype=torch.int32)
    native()[0].select_pages_cpu(
        (
            block_index.data_ptr(), block_pages.data_ptr(), _address(sink_pages),
            _address(recent_pages), table.data_ptr(),
        ),
        (streams, rows[1] if len(rows) > 1 else 1, chosen, blocks, width, sinks, recent),
        torch.get_num_threads(),
    )  # fmt: skip
    return table
