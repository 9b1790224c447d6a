"""The raw retrieval ops: schemas, fakes, dispatch (contracts: retrieve.py)."""

from __future__ import annotations

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.native.retrieve import no_cuda_choice
from vicostream_kernels.ops._registry import register
from vicostream_kernels.ops._retrieve_checks import (
    capacity_of,
    check_index_values,
    check_page_lists,
    check_select_pages,
    check_summarize,
    check_topk,
    check_topk_pages,
    check_topk_values,
    warn_of_nan,
)

for _name in ("summarize_blocks", "topk_blocks", "select_pages", "topk_pages"):
    backends.declare(
        "retrieve",
        _name,
        cuda=f"vicostream_kernels.native.retrieve:{_name}_cuda",
        triton=f"vicostream_kernels.triton_kernels.retrieve:{_name}",
        cpu=f"vicostream_kernels.native.retrieve:{_name}_cpu",
        reference=f"vicostream_kernels.reference.retrieve:{_name}",
    )


@checks.remember_pages
def _serve_select_pages(block_index, block_pages, sink_pages, recent_pages, backend):
    tensors = (block_index, block_pages, sink_pages, recent_pages)
    check_select_pages(*tensors)
    return backends.prepared("select_pages", backend, block_index, tensors)


# --- registration ------------------------------------------------------------------------------


def _run_summarize(k_pages, block_pages, page_fill, kind="mean", sub=1, backend="auto"):
    check_summarize(k_pages, block_pages, page_fill, kind, sub)
    if checks.CHECK_VALUES:
        pages, page_size = k_pages.shape[:2]
        check_index_values("summarize_blocks", "block_pages", block_pages, pages)
        check_index_values("summarize_blocks", "page_fill", page_fill, page_size + 1, least=0)
    run = backends.resolve("summarize_blocks", backend, k_pages)
    return run(k_pages, block_pages, page_fill, kind, sub)


def _fake_summarize(k_pages, block_pages, page_fill, kind="mean", sub=1, backend="auto"):
    check_summarize(k_pages, block_pages, page_fill, kind, sub)
    (streams, blocks, _), (heads, d) = block_pages.shape, k_pages.shape[2:]
    if kind == "mean":
        mean = k_pages.new_empty((streams, blocks, heads, d), dtype=torch.float32)
        return mean, k_pages.new_empty((streams, blocks), dtype=torch.int32)
    shape = (streams, blocks, sub, heads, d)
    return tuple(k_pages.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _prepared_topk(
    op, backend, dims, tensors, score, pool, scope, sm_scale, k, ratio, mass, token_budget,
    tokens_per_block, max_blocks, min_k, group, force_first, force_last,
):  # fmt: skip
    """What takes the tensors of `topk_blocks` or `topk_pages`, once they are checked."""
    query, external_score = tensors[0], tensors[6]
    return backends.prepared(
        op,
        backend,
        query if external_score is None else external_score,
        tensors,
        score, pool, scope, sm_scale,
        cuda_refuses=no_cuda_choice(pool if external_score is None else "mean", mass),
        k=k, ratio=ratio, mass=mass, token_budget=token_budget, tokens_per_block=tokens_per_block,
        min_k=min_k, group=group, force_first=force_first, force_last=force_last,
        capacity=capacity_of(
            dims["NB"], k, ratio, mass, token_budget, tokens_per_block, max_blocks, min_k, group,
            force_first, force_last,
        ),
    )  # fmt: skip


@checks.remember
def _serve_topk(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, score, pool, scope, sm_scale, k, ratio, mass, token_budget, tokens_per_block,
    max_blocks, min_k, group, force_first, force_last, backend,
):  # fmt: skip
    """Checks; returns what takes the tensors."""
    tensors = (
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens,
    )  # fmt: skip
    options = (
        score, pool, scope, sm_scale, k, ratio, mass, token_budget, tokens_per_block, max_blocks,
        min_k, group, force_first, force_last,
    )  # fmt: skip
    dims = check_topk("topk_blocks", *tensors, *options)
    return _prepared_topk("topk_blocks", backend, dims, tensors, *options)


@checks.remember
def _serve_topk_pages(
    query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, block_pages, sink_pages, recent_pages, score, pool, scope, sm_scale, k, ratio,
    mass, token_budget, tokens_per_block, max_blocks, min_k, group, force_first, force_last,
    backend,
):  # fmt: skip
    tensors = (
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens,
    )  # fmt: skip
    options = (
        score, pool, scope, sm_scale, k, ratio, mass, token_budget, tokens_per_block, max_blocks,
        min_k, group, force_first, force_last,
    )  # fmt: skip
    pages = (block_pages, sink_pages, recent_pages)
    dims = check_topk_pages(tensors, *pages, options)
    return _prepared_topk("topk_pages", backend, dims, (*tensors, *pages), *options)


def _run_topk(
    query, summary, summary_max=None, summary_count=None, cu_seqlens=None, num_blocks=None,
    external_score=None, block_tokens=None, score="dot", pool="mean", scope="stream",
    sm_scale=None, k=None, ratio=None, mass=None, token_budget=None, tokens_per_block=None,
    max_blocks=None, min_k=1, group=1, force_first=0, force_last=0, backend="auto",
):  # fmt: skip
    run = _serve_topk(
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens, score, pool, scope, sm_scale, k, ratio, mass, token_budget,
        tokens_per_block, max_blocks, min_k, group, force_first, force_last, backend,
    )  # fmt: skip
    if checks.CHECK_VALUES:
        check_topk_values(
            "topk_blocks", query, summary, cu_seqlens, num_blocks, external_score, block_tokens
        )
    index, count, scores = run(
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens,
    )  # fmt: skip
    if checks.CHECK_VALUES:
        warn_of_nan("topk_blocks", scores, summary_count)
    return index, count, scores


def _run_topk_pages(
    query, summary, block_pages, sink_pages=None, recent_pages=None, summary_max=None,
    summary_count=None, cu_seqlens=None, num_blocks=None, external_score=None, block_tokens=None,
    score="dot", pool="mean", scope="stream", sm_scale=None, k=None, ratio=None, mass=None,
    token_budget=None, tokens_per_block=None, max_blocks=None, min_k=1, group=1, force_first=0,
    force_last=0, backend="auto",
):  # fmt: skip
    tensors = (
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens, block_pages, sink_pages, recent_pages,
    )  # fmt: skip
    run = _serve_topk_pages(
        *tensors, score, pool, scope, sm_scale, k, ratio, mass, token_budget, tokens_per_block,
        max_blocks, min_k, group, force_first, force_last, backend,
    )  # fmt: skip
    if checks.CHECK_VALUES:
        check_topk_values(
            "topk_pages", query, summary, cu_seqlens, num_blocks, external_score, block_tokens
        )
        check_page_lists("topk_pages", block_pages, sink_pages, recent_pages)
    found = run(*tensors)
    if checks.CHECK_VALUES:
        warn_of_nan("topk_pages", found[3], summary_count)
    return found


def _fake_choice(dims, scope, like, k, ratio, mass, token_budget, tokens_per_block, *rest):
    capacity = capacity_of(dims["NB"], k, ratio, mass, token_budget, tokens_per_block, *rest)
    rows = (dims["S"],) if scope == "stream" else (dims["S"], dims["R"])
    return (
        like.new_empty((*rows, capacity), dtype=torch.int32),
        like.new_empty(rows, dtype=torch.int32),
        like.new_empty((*rows, dims["NB"]), dtype=torch.float32),
    )


def _fake_topk(
    query, summary, summary_max=None, summary_count=None, cu_seqlens=None, num_blocks=None,
    external_score=None, block_tokens=None, score="dot", pool="mean", scope="stream",
    sm_scale=None, k=None, ratio=None, mass=None, token_budget=None, tokens_per_block=None,
    max_blocks=None, min_k=1, group=1, force_first=0, force_last=0, backend="auto",
):  # fmt: skip
    options = (
        k, ratio, mass, token_budget, tokens_per_block, max_blocks, min_k, group, force_first,
        force_last,
    )  # fmt: skip
    dims = check_topk(
        "topk_blocks", query, summary, summary_max, summary_count, cu_seqlens, num_blocks,
        external_score, block_tokens, score, pool, scope, sm_scale, *options,
    )  # fmt: skip
    like = query if external_score is None else external_score
    return _fake_choice(dims, scope, like, *options)


def _fake_topk_pages(
    query, summary, block_pages, sink_pages=None, recent_pages=None, summary_max=None,
    summary_count=None, cu_seqlens=None, num_blocks=None, external_score=None, block_tokens=None,
    score="dot", pool="mean", scope="stream", sm_scale=None, k=None, ratio=None, mass=None,
    token_budget=None, tokens_per_block=None, max_blocks=None, min_k=1, group=1, force_first=0,
    force_last=0, backend="auto",
):  # fmt: skip
    tensors = (
        query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
        block_tokens,
    )  # fmt: skip
    options = (
        k, ratio, mass, token_budget, tokens_per_block, max_blocks, min_k, group, force_first,
        force_last,
    )  # fmt: skip
    pages = (block_pages, sink_pages, recent_pages)
    dims = check_topk_pages(tensors, *pages, (score, pool, scope, sm_scale, *options))
    found = _fake_choice(dims, scope, query if external_score is None else external_score, *options)
    return _fake_table(found[0], *pages), *found


def _run_select_pages(
    block_index, block_pages, sink_pages=None, recent_pages=None, backend="auto"
):  # fmt: skip
    run = _serve_select_pages(block_index, block_pages, sink_pages, recent_pages, backend)
    if checks.CHECK_VALUES:
        blocks = block_pages.shape[1]
        check_index_values("select_pages", "block_index", block_index, blocks)
        check_page_lists("select_pages", block_pages, sink_pages, recent_pages)
    return run(block_index, block_pages, sink_pages, recent_pages)


def _fake_select_pages(
    block_index, block_pages, sink_pages=None, recent_pages=None, backend="auto"
):  # fmt: skip
    check_select_pages(block_index, block_pages, sink_pages, recent_pages)
    return _fake_table(block_index, block_pages, sink_pages, recent_pages)


def _fake_table(block_index, block_pages, sink_pages, recent_pages) -> torch.Tensor:
    length = block_index.shape[-1] * block_pages.shape[2]
    for extra in (sink_pages, recent_pages):
        length = length + (0 if extra is None else extra.shape[1])
    return block_index.new_empty((*block_index.shape[:-1], length), dtype=torch.int32)


summarize_blocks = register(
    "summarize_blocks(Tensor k_pages, Tensor block_pages, Tensor page_fill, "
    'str kind="mean", int sub=1, str backend="auto") -> (Tensor, Tensor)',
    _run_summarize,
    _fake_summarize,
)
_CHOICE = (
    "Tensor? summary_max=None, Tensor? summary_count=None, Tensor? cu_seqlens=None, "
    "Tensor? num_blocks=None, Tensor? external_score=None, Tensor? block_tokens=None, "
    'str score="dot", str pool="mean", str scope="stream", float? sm_scale=None, int? k=None, '
    "float? ratio=None, float? mass=None, int? token_budget=None, int? tokens_per_block=None, "
    "int? max_blocks=None, int min_k=1, int group=1, int force_first=0, int force_last=0, "
    'str backend="auto"'
)
topk_blocks = register(
    f"topk_blocks(Tensor? query, Tensor? summary, {_CHOICE}) -> (Tensor, Tensor, Tensor)",
    _run_topk,
    _fake_topk,
)
topk_pages = register(
    "topk_pages(Tensor? query, Tensor? summary, Tensor block_pages, Tensor? sink_pages=None, "
    f"Tensor? recent_pages=None, {_CHOICE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_topk_pages,
    _fake_topk_pages,
)
select_pages = register(
    "select_pages(Tensor block_index, Tensor block_pages, Tensor? sink_pages=None, "
    'Tensor? recent_pages=None, str backend="auto") -> Tensor',
    _run_select_pages,
    _fake_select_pages,
    integral=True,
)
