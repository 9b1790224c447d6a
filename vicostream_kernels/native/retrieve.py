"""summarize_blocks, topk_blocks, select_pages and both as one, in C++ (CPU) and CUDA C++."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vicostream_kernels.backends import native
from vicostream_kernels.native._stream import current_stream

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SCORES = {"dot": 0, "cosine": 1, "bound": 2}
_POOLS = {"mean": 0, "max": 1, "softmax": 2}
_SCOPES = {"stream": 0, "kv_head": 1, "query_head": 2}
#: Tensors of a choice of blocks that come first, and where its scope stands among the arguments.
_TENSORS, _SCOPE_AT = 8, 10


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _packed(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _summarize(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """The arguments of the native call but its last, what it writes, and what must outlive it."""
    k_pages, block_pages, page_fill = _dense(k_pages), block_pages.contiguous(), _packed(page_fill)
    (streams, blocks, width), (heads, d) = block_pages.shape, k_pages.shape[2:]
    on = {"device": k_pages.device}
    if kind == "mean":
        first = torch.empty((streams, blocks, heads, d), dtype=torch.float32, **on)
        second = torch.empty((streams, blocks), dtype=torch.int32, **on)
    else:
        shape = (streams, blocks, sub, heads, d)
        first, second = (torch.empty(shape, dtype=torch.float32, **on) for _ in range(2))
    high, count = (0, second.data_ptr()) if kind == "mean" else (second.data_ptr(), 0)
    call = (
        _DTYPES[k_pages.dtype],
        d,
        (
            k_pages.data_ptr(), block_pages.data_ptr(), page_fill.data_ptr(), first.data_ptr(),
            high, count,
        ),
        (*k_pages.shape[:3], streams * blocks, width, sub),
        k_pages.stride()[:3],
    )  # fmt: skip
    return call, first, second, (k_pages, block_pages, page_fill)


def summarize_blocks_cpu(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.summarize_blocks``; ``torch.get_num_threads()`` threads."""
    call, first, second, _kept = _summarize(k_pages, block_pages, page_fill, kind, sub)
    native()[0].summarize_blocks_cpu(*call, torch.get_num_threads())
    return first, second


def summarize_blocks_cuda(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.summarize_blocks``; on the current stream of the keys' device."""
    with current_stream(k_pages.device) as stream:
        call, first, second, _kept = _summarize(k_pages, block_pages, page_fill, kind, sub)
        native()[0].summarize_blocks_cuda(*call, stream)
    return first, second


def _score(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, score, pool, scope, sm_scale
) -> tuple[tuple[Any, ...], torch.Tensor, tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """The arguments of the native call, the scores [S, R, NB] float32 that it writes up to
    ``num_blocks``, and what must outlive it."""
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
    scores = torch.empty((streams, rows, blocks), dtype=torch.float32, device=query.device)
    call = (
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
    )  # fmt: skip
    return call, scores, (query, summary, summary_max, summary_count, cu_seqlens)


def _rule(
    block_tokens, k, ratio, mass, token_budget, tokens_per_block
) -> tuple[int, float, int]:  # fmt: skip
    """Rule, amount and target as C++ has them."""
    if ratio is not None:
        return 1, ratio, 0
    if mass is not None:
        return 2, mass, 0
    if block_tokens is not None:
        return 3, 0.0, token_budget
    return 0, 0.0, k if k is not None else token_budget // tokens_per_block


@dataclass
class _Choice:
    """One call's scores, which are there or under way, and what choosing among them takes."""

    scores: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor
    rule: int
    amount: float
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    kept: tuple[torch.Tensor | None, ...]

    def results(self, scope: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = (self.index, self.count, self.scores)
        return tuple(x[:, 0] for x in found) if scope == "stream" else found


def _scored(
    cuda, query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, score, pool, scope, sm_scale, *, k, ratio, mass, token_budget, tokens_per_block,
    min_k, group, force_first, force_last, capacity,
) -> _Choice:  # fmt: skip
    """Scores on both backends; ``cuda``: the stream, or None on the CPU."""
    module = native()[0]
    num_blocks, block_tokens = _packed(num_blocks), _packed(block_tokens)
    if external_score is None:
        call, scores, _kept = _score(
            query, summary, summary_max, summary_count, _packed(cu_seqlens), num_blocks,
            score, pool, scope, sm_scale,
        )  # fmt: skip
        if cuda is None:
            module.score_blocks_cpu(*call, torch.get_num_threads())
        elif scores.numel():
            made = module.ScoreCall(*call)
            size = module.score_blocks_workspace(made)
            workspace = torch.empty(size, dtype=torch.float32, device=scores.device)
            module.score_blocks_cuda(made, workspace.data_ptr(), cuda)
    else:
        like = {"dtype": torch.float32, "device": external_score.device}
        scores = torch.empty(external_score.shape, **like).copy_(external_score)
        scores = scores[:, None] if scope == "stream" else scores
    streams, rows, blocks = scores.shape
    rule, amount, target = _rule(block_tokens, k, ratio, mass, token_budget, tokens_per_block)
    index = torch.empty((streams, rows, capacity), dtype=torch.int32, device=scores.device)
    count = torch.empty((streams, rows), dtype=torch.int32, device=scores.device)
    addresses = (
        scores.data_ptr(), _address(num_blocks), _address(block_tokens), index.data_ptr(),
        count.data_ptr(),
    )  # fmt: skip
    sizes = (
        streams, rows, blocks, capacity, target, min_k, group,
        min(force_first, blocks), min(force_last, blocks),
    )  # fmt: skip
    kept = (num_blocks, block_tokens)
    return _Choice(scores, index, count, rule, amount, addresses, sizes, kept)


def _choose_cpu(choice: _Choice) -> None:
    native()[0].select_blocks_cpu(
        choice.rule, choice.amount, choice.addresses, choice.sizes, torch.get_num_threads()
    )


def topk_blocks_cpu(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.topk_blocks``; ``torch.get_num_threads()`` threads."""
    choice = _scored(None, *args, **options)
    _choose_cpu(choice)
    return choice.results(args[_SCOPE_AT])


def _topk_layout(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, score, pool, scope, sm_scale, *, k, ratio, mass, token_budget, tokens_per_block,
    min_k, group, force_first, force_last, capacity,
) -> tuple[Any, Callable[..., tuple[Any, ...]]] | None:  # fmt: skip
    """What all calls with tensors laid out like these share, and what makes (index, count, scores)
    and the addresses of one of them; None: where a tensor must be copied or scores are given."""
    vectors = (cu_seqlens, num_blocks, block_tokens)
    rows = (query, summary, summary_max, summary_count)
    if external_score is not None or any(x is not None and _dense(x) is not x for x in rows):
        return None
    if any(x is not None and not x.is_contiguous() for x in vectors):
        return None
    call, like, _kept = _score(
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, score, pool, scope,
        sm_scale,
    )  # fmt: skip
    streams, rows, blocks = like.shape
    rule = _rule(block_tokens, k, ratio, mass, token_budget, tokens_per_block)
    sizes = (
        streams, rows, blocks, capacity, rule[2], min_k, group,
        min(force_first, blocks), min(force_last, blocks),
    )  # fmt: skip
    outer = (streams,) if scope == "stream" else (streams, rows)
    on = {"device": torch.device("cpu")}

    def make(query, summary, summary_max, summary_count, cu_seqlens, num_blocks, _, block_tokens):
        index = torch.empty(*outer, capacity, dtype=torch.int32, **on)
        count = torch.empty(*outer, dtype=torch.int32, **on)
        scores = torch.empty(*outer, blocks, dtype=torch.float32, **on)
        addresses = (
            query.data_ptr(), summary.data_ptr(), _address(summary_max), _address(summary_count),
            _address(cu_seqlens), _address(num_blocks), _address(block_tokens), scores.data_ptr(),
            index.data_ptr(), count.data_ptr(),
        )  # fmt: skip
        return (index, count, scores), addresses

    return native()[0].TopkLayout(*call, *rule[:2], sizes), make


def _prepare_topk(*args: Any, **options: Any) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """The same for all calls with tensors laid out like these, in one native call."""
    made = _topk_layout(*args, **options)
    if made is None:
        return None
    layout, make = made
    choose, threads = native()[0].topk_blocks_cpu, torch.get_num_threads

    def run(*tensors):
        found, addresses = make(*tensors)
        choose(layout, addresses, threads())
        return found

    return run


topk_blocks_cpu.prepare = _prepare_topk


def topk_blocks_cuda(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.topk_blocks``; on the current stream of the scores' device."""
    query, external_score = args[0], args[6]
    module = native()[0]
    with current_stream((query if external_score is None else external_score).device) as stream:
        choice = _scored(stream, *args, **options)
        size = module.select_blocks_workspace(choice.rule, choice.sizes) // 4
        lists = torch.empty(size, dtype=torch.int32, device=choice.scores.device)
        module.select_blocks_cuda(
            choice.rule, choice.amount, choice.addresses, choice.sizes, lists.data_ptr(), stream
        )
    return choice.results(args[_SCOPE_AT])


def no_cuda_choice(pool: str, mass: float | None) -> str | None:
    """Why the CUDA kernels don't serve a choice of blocks, or None where they do."""
    if pool == "softmax":
        return "the cuda kernels pool by mean or max"
    if mass is not None:
        return "the cuda kernels choose by k, ratio or token_budget"
    return None


def _pages(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...], torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Addresses, sizes, the table that is written, and what must outlive the call."""
    block_index, block_pages = block_index.contiguous(), block_pages.contiguous()
    sink_pages, recent_pages = _packed(sink_pages), _packed(recent_pages)
    streams, blocks, width = block_pages.shape
    *rows, chosen = block_index.shape
    sinks = 0 if sink_pages is None else sink_pages.shape[1]
    recent = 0 if recent_pages is None else recent_pages.shape[1]
    length = sinks + chosen * width + recent
    table = block_index.new_empty(*rows, length)  # half the time of torch.empty
    addresses = (
        block_index.data_ptr(), block_pages.data_ptr(), _address(sink_pages),
        _address(recent_pages), table.data_ptr(),
    )  # fmt: skip
    sizes = (streams, rows[1] if len(rows) > 1 else 1, chosen, blocks, width, sinks, recent)
    return addresses, sizes, table, (block_index, block_pages, sink_pages, recent_pages)


def select_pages_cpu(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> torch.Tensor:
    """See ``vicostream_kernels.select_pages``; ``torch.get_num_threads()`` threads."""
    run = _prepare_select_pages(block_index, block_pages, sink_pages, recent_pages)
    return run(block_index, block_pages, sink_pages, recent_pages)


def _prepare_select_pages(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> Callable[..., torch.Tensor]:
    """The same for all calls with tensors of these shapes."""
    _, sizes, table, _kept = _pages(block_index, block_pages, sink_pages, recent_pages)
    module, shape, threads = native()[0], tuple(table.shape), torch.get_num_threads
    layout, select = module.PagesLayout(sizes), module.select_pages_cpu

    def run(block_index, block_pages, sink_pages, recent_pages):
        block_index, block_pages = block_index.contiguous(), block_pages.contiguous()
        sinks = recent = 0
        if sink_pages is not None:
            sink_pages = sink_pages.contiguous()
            sinks = sink_pages.data_ptr()
        if recent_pages is not None:
            recent_pages = recent_pages.contiguous()
            recent = recent_pages.data_ptr()
        table = block_index.new_empty(*shape)  # half the time of torch.empty
        select(
            layout, block_index.data_ptr(), block_pages.data_ptr(), sinks, recent,
            table.data_ptr(), threads(),
        )  # fmt: skip
        return table

    return run


select_pages_cpu.prepare = _prepare_select_pages


def select_pages_cuda(
    block_index: torch.Tensor,
    block_pages: torch.Tensor,
    sink_pages: torch.Tensor | None,
    recent_pages: torch.Tensor | None,
) -> torch.Tensor:
    """See ``vicostream_kernels.select_pages``; on the current stream of the blocks' device."""
    with current_stream(block_index.device) as stream:
        addresses, sizes, table, _kept = _pages(block_index, block_pages, sink_pages, recent_pages)
        module = native()[0]
        size = module.select_pages_workspace(sizes) // 4
        workspace = torch.empty(size, dtype=torch.int32, device=table.device)
        module.select_pages_cuda(addresses, sizes, workspace.data_ptr(), stream)
    return table


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[torch.Tensor | None, ...]]:
    """The arguments of topk_pages as those of topk_blocks, and (block_pages, sinks, recent)."""
    pages = slice(_TENSORS, _TENSORS + 3)
    return args[: pages.start] + args[pages.stop :], args[pages]


def topk_pages_cpu(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """See ``vicostream_kernels.topk_pages``; ``torch.get_num_threads()`` threads."""
    blocks, pages = _split(args)
    found = topk_blocks_cpu(*blocks, **options)
    return select_pages_cpu(found[0], *pages), *found


def _prepare_topk_pages(*args: Any, **options: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same for all calls with tensors laid out like these, in one native call where nothing
    must be copied; else in three."""
    blocks, listed = _split(args)
    made = _topk_layout(*blocks, **options)
    if made is None or any(x is not None and not x.is_contiguous() for x in listed):
        return None
    layout, make = made
    like = make(*blocks[:_TENSORS])[0][0]
    _, sizes, table, _kept = _pages(like, *listed)
    module, shape, threads = native()[0], tuple(table.shape), torch.get_num_threads
    page_layout, choose = module.PagesLayout(sizes), module.topk_pages_cpu

    def run(*tensors):
        found, addresses = make(*tensors[:_TENSORS])
        block_pages, sink_pages, recent_pages = tensors[_TENSORS:]
        index = found[0]
        table = index.new_empty(*shape)
        listed = (
            index.data_ptr(), block_pages.data_ptr(), _address(sink_pages), _address(recent_pages),
            table.data_ptr(),
        )  # fmt: skip
        choose(layout, addresses, page_layout, listed, threads())
        return table, *found

    return run


topk_pages_cpu.prepare = _prepare_topk_pages


def topk_pages_cuda(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """See ``vicostream_kernels.topk_pages``; on the current stream of the scores' device. A row's
    pages are listed by the launch that chose its blocks."""
    blocks, listed = _split(args)
    query, external_score = blocks[0], blocks[6]
    scope, module = blocks[_SCOPE_AT], native()[0]
    with current_stream((query if external_score is None else external_score).device) as stream:
        choice = _scored(stream, *blocks, **options)
        found = choice.results(scope)
        addresses, sizes, table, _kept = _pages(found[0], *listed)
        size = module.select_block_pages_workspace(choice.rule, choice.sizes, sizes) // 4
        workspace = torch.empty(size, dtype=torch.int32, device=table.device)
        module.select_block_pages_cuda(
            choice.rule, choice.amount, choice.addresses, choice.sizes, addresses, sizes,
            workspace.data_ptr(), stream,
        )  # fmt: skip
    return table, *found
