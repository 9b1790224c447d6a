"""The scores of topk_blocks against plain loops in float64; how the ops are registered."""

from __future__ import annotations

import pytest
import torch
from retrieve_keys import paged_keys

import vicostream_kernels as vico
from kit import interpreter, tensors
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels.reference import retrieve as reference
from vicostream_kernels.reference._precision import accumulate_in

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCORES, POOLS, SCOPES = ("dot", "cosine", "bound"), ("mean", "max", "softmax"), (
    "stream", "kv_head", "query_head",
)  # fmt: skip


# --- scores ------------------------------------------------------------------------------------


def rows_of(scope: str, heads: int, groups: int) -> list[list[int]]:
    """The query heads of each row."""
    share = heads // groups
    return {
        "stream": [list(range(heads))],
        "kv_head": [list(range(g * share, (g + 1) * share)) for g in range(groups)],
        "query_head": [[h] for h in range(heads)],
    }[scope]


def one_score(query, low, high, heads, share, score) -> float:
    """One token's float64 score of one block for heads as one vector; parts along dim 0."""
    q = torch.cat([query[h] for h in heads])
    best = -torch.inf
    for part in range(low.shape[0]):
        k_low = torch.cat([low[part, h // share] for h in heads])
        if score == "dot":
            return float(q @ k_low)
        if score == "cosine":
            return float(torch.cosine_similarity(q, k_low, dim=0, eps=0))
        k_high = torch.cat([high[part, h // share] for h in heads])
        best = max(best, float(torch.maximum(q * k_low, q * k_high).sum()))
    return best


def loop_scores(queries, low, high, n, score, pool, scope, sm_scale):
    """[R, NB] float64 of one stream: queries [T, H, d], low and high [NB, sub, G, d]."""
    heads, share = queries.shape[1], queries.shape[1] // low.shape[2]
    rows = rows_of(scope, heads, low.shape[2])
    out = torch.full((len(rows), low.shape[0]), -torch.inf, dtype=torch.float64)
    for r, row in enumerate(rows):
        if pool == "mean":
            queries_of_row = queries.mean(0, keepdim=True)
        else:
            queries_of_row = queries
        if pool == "softmax":
            shares = []
            for query in queries_of_row:
                for h in row:
                    logits = [
                        one_score(query, low[b], high[b], [h], share, score) for b in range(n)
                    ]
                    shares.append(torch.softmax(torch.tensor(logits).double() * sm_scale, 0))
            out[r, :n] = torch.stack(shares).mean(0)
            continue
        for b in range(n):
            each = [
                one_score(query, low[b], high[b], row, share, score) for query in queries_of_row
            ]
            out[r, b] = max(each)
    return out


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("score", SCORES)
def test_scores_against_loops(score, pool, scope, dtype, backend):
    name, device = backend
    heads, groups, d, blocks, sub = 6, 2, 16, 7, 3
    query = tensors.randn((9, heads, d), dtype, seed=1)
    query[7:] = torch.nan  # beyond the last stream: padding of a bucket
    low = tensors.randn((2, blocks, sub if score == "bound" else 1, groups, d), seed=2)
    high = tensors.strided(low + tensors.randn(tuple(low.shape), seed=3).abs())
    num = torch.tensor([7, 4], dtype=torch.int32)
    low[1, 4:] = torch.nan  # beyond num_blocks: nobody may read it into a score
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    sm_scale = 0.3 if pool == "softmax" else None
    summary = (low, high) if score == "bound" else low[:, :, 0]

    def to(x):
        return tuple(map(to, x)) if isinstance(x, tuple) else x.to(device)

    got = vico.topk_blocks(
        to(query), to(summary), k=3, score=score, pool=pool, scope=scope, sm_scale=sm_scale,
        num_blocks=to(num), cu_seqlens=to(cu), backend=name,
    )  # fmt: skip
    truth = torch.stack(
        [
            loop_scores(
                query[cu[s] : cu[s + 1]].double(), low[s].double(), high[s].double(), int(num[s]),
                score, pool, scope, sm_scale,
            )
            for s in range(2)
        ]
    )  # fmt: skip
    with accumulate_in(torch.float32):
        parts = (*summary, None) if score == "bound" else (summary, None, None)
        in_float32 = reference.score_blocks(query, *parts, cu, num, score, pool, scope, sm_scale)
    shape = (2, blocks) if scope == "stream" else (2, truth.shape[1], blocks)
    assert got.scores.dtype == torch.float32 and got.scores.is_contiguous()
    assert_matches(got.scores, truth.view(shape), in_float32.view(shape))
    if pool == "softmax":
        sums = got.scores.clamp_min(0).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_of_plain_vectors(packed, score, dtype, backend):
    name, device = backend
    query = tensors.randn((4 if packed else 2, 33), dtype, seed=5)
    summary = tensors.randn((2, 6, 33), dtype, seed=6)
    summary[1, 2] = 0  # a zero vector has cosine 0, not NaN
    cu = torch.tensor([0, 1, 4], dtype=torch.int32) if packed else None
    got = vico.topk_blocks(
        query.to(device), summary.to(device), k=2, score=score,
        cu_seqlens=None if cu is None else cu.to(device), backend=name,
    )  # fmt: skip
    pooled = torch.stack([tokens.double().mean(0) for tokens in (query[:1], query[1:])])
    truth = torch.einsum("sd,snd->sn", pooled, summary.double())
    if score == "cosine":
        norms = pooled.norm(dim=-1)[:, None] * summary.double().norm(dim=-1)
        truth = (truth / norms).nan_to_num(0.0)
    with accumulate_in(torch.float32):
        in_float32 = reference.score_blocks(query, summary, cu_seqlens=cu, score=score)[:, 0]
    assert_matches(got.scores, truth, in_float32)
    assert got.block_index.shape == (2, 2) and got.count.tolist() == [2, 2]


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("sub", [1, 4])
def test_the_bound_is_an_upper_bound_of_every_key(sub, backend):
    name, device = backend
    k_pages = tensors.randn((6, 8, 2, 16), seed=7).to(device)
    table = torch.arange(6, dtype=torch.int32, device=device).view(1, 3, 2)
    fill = torch.full((6,), 8, dtype=torch.int32, device=device)
    query = tensors.randn((1, 4, 16), seed=8).to(device)
    summary = vico.summarize_blocks(k_pages, table, fill, kind="minmax", sub=sub, backend=name)
    got = vico.topk_blocks(
        query, summary, k=1, score="bound", scope="query_head", backend=name
    ).scores[0]
    keys = k_pages.reshape(3, 16, 2, 16).repeat_interleave(2, dim=2)
    best = torch.einsum("hd,nthd->hnt", query[0], keys).amax(-1)
    assert (got >= best - 1e-4).all()
    if sub == 4:  # parts make it tighter
        whole = vico.summarize_blocks(k_pages, table, fill, kind="minmax", backend=name)
        loose = vico.topk_blocks(query, whole, k=1, score="bound", scope="query_head").scores[0]
        assert (got <= loose + 1e-4).all() and (got < loose - 1e-2).any()


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("score", SCORES)
def test_nan_and_empty_blocks_rank_last_and_stay_alone(score, backend):
    name, device = backend
    low = tensors.randn((1, 6, 2, 2, 8), seed=10) - 20
    high = low + 1
    low[0, 1], high[0, 1] = torch.inf, -torch.inf  # no tokens
    low[0, 3], high[0, 3] = torch.nan, torch.nan
    low[0, 4, 1], high[0, 4, 1] = torch.inf, -torch.inf  # its other part has tokens
    mean = low[:, :, 0].masked_fill(low[:, :, 0].isinf(), torch.nan)
    query = tensors.randn((1, 4, 8), seed=11).abs()

    def choose(k, parts=slice(None), **more):
        ends = tuple(x[:, :, parts].to(device) for x in (low, high))
        summary = ends if score == "bound" else mean.to(device)
        return vico.topk_blocks(query.to(device), summary, k=k, score=score, backend=name, **more)

    got = choose(4)
    assert got.scores[0].isnan().tolist() == [False, True, False, True, False, False]
    assert got.block_index.tolist() == [[0, 2, 4, 5]]
    assert choose(5).block_index.tolist() == [[0, 1, 2, 4, 5]], "NaN ties go to the lowest index"
    first_part = choose(4, parts=slice(0, 1))
    assert got.scores[0, 4] == first_part.scores[0, 4] < 0, "an empty part counts for nothing"
    assert choose(2, pool="max").scores[0].isnan().sum() == 2
    if name == "cuda":
        return  # does not serve what follows
    shares = choose(4, pool="softmax")
    assert shares.scores[0].isnan().tolist() == [False, True, False, True, False, False]
    torch.testing.assert_close(shares.scores.nansum().cpu(), torch.tensor(1.0))


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("pool", POOLS)
def test_a_question_without_tokens_or_with_nan(pool, backend):
    name, device = backend
    query = tensors.randn((5, 2, 8), seed=12)
    query[4] = torch.nan
    summary = tensors.randn((3, 4, 1, 8), seed=13)
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    got = vico.topk_blocks(
        query.to(device), summary.to(device), k=2, pool=pool, cu_seqlens=cu.to(device), backend=name
    )
    assert got.scores.isnan().all(-1).tolist() == [False, True, True]
    assert not got.scores[0].isnan().any()
    assert got.block_index[1:].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("score", SCORES)
def test_a_stream_has_the_bits_it_has_alone(score, pool, scope, backend):
    name, device = backend
    half = torch.float16 if interpreter.ACTIVE else torch.bfloat16  # wrong in the interpreter
    query = tensors.randn((11, 4, 24), half, seed=14).to(device)
    low = tensors.randn((3, 40, 2, 2, 24), seed=15).to(device)
    high = low + 1
    cu = [0, 2, 10, 11]
    num = torch.tensor([40, 13, 1], dtype=torch.int32, device=device)
    kwargs = {"score": score, "pool": pool, "scope": scope, "ratio": 0.4, "backend": name}

    def choose(tokens, low, high, starts, num_blocks):
        summary = (low, high) if score == "bound" else low[:, :, 0]
        starts = torch.tensor(starts, dtype=torch.int32, device=device)
        return vico.topk_blocks(tokens, summary, cu_seqlens=starts, num_blocks=num_blocks, **kwargs)

    together = choose(query, low, high, cu, num)
    for s in range(3):
        n = int(num[s])
        alone = choose(
            query[cu[s] : cu[s + 1]], low[s : s + 1, :n], high[s : s + 1, :n],
            [0, cu[s + 1] - cu[s]], None,
        )  # fmt: skip
        assert_same_bits(together.scores[s, ..., :n], alone.scores[0])
        assert (together.scores[s, ..., n:] == -torch.inf).all()
        width = alone.block_index.shape[-1]
        assert torch.equal(together.block_index[s, ..., :width], alone.block_index[0])
        assert torch.equal(together.count[s], alone.count[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", [{"k": 3}, {"ratio": 0.4}, {"mass": 0.5}])
@pytest.mark.parametrize("pool", POOLS)
def test_nothing_waits_for_the_device(pool, rule):
    k_pages, table, fill = (x.cuda() for x in paged_keys(torch.bfloat16))
    query = tensors.randn((4, 4, 8), torch.bfloat16).cuda()
    cu = torch.tensor([0, 1, 4], dtype=torch.int32).cuda()

    def run():
        means = vico.summarize_blocks(k_pages, table, fill)
        found = vico.topk_blocks(query, means, pool=pool, cu_seqlens=cu, **rule)
        return vico.select_pages(found.block_index, table)

    wanted = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, wanted)


# --- registration ------------------------------------------------------------------------------


def test_registration_and_fullgraph():
    ops = torch.ops.vicostream
    k_pages, table, fill = paged_keys(torch.float16)
    table = table[:, ::2]  # no empty block: opcheck compares NaN with NaN and finds them different
    for kind, sub in (("mean", 1), ("minmax", 2)):
        check_op(ops.summarize_blocks.default, (k_pages, table, fill, kind, sub))
    check_refuses_grad(ops.summarize_blocks.default, (k_pages, table, fill))
    query = tensors.randn((4, 4, 16), torch.bfloat16)
    low = tensors.randn((2, 9, 3, 2, 16))
    cu = torch.tensor([0, 1, 4], dtype=torch.int32)
    num = torch.tensor([9, 5], dtype=torch.int32)
    sizes = tensors.ints((2, 9), 1, 5)
    op = ops.topk_blocks.default
    mean = low[:, :, 0]
    check_op(op, (query, mean, None, None, cu, num), {"k": 4, "scope": "kv_head"})
    check_op(
        op, (query, low, low + 1, None, cu), {"ratio": 0.4, "score": "bound", "scope": "query_head"}
    )  # noqa: E501
    check_op(
        op, (query, mean, None, None, cu, num, None, sizes), {"token_budget": 9, "max_blocks": 4}
    )  # noqa: E501
    check_op(op, (None, None, None, None, None, num, mean[..., 0, 0]), {"mass": 0.5, "group": 2})
    check_refuses_grad(op, (query, mean, None, None, cu), {"k": 2})

    def run(query, mean, cu, num):
        got = vico.topk_blocks(query, mean, ratio=0.3, pool="max", cu_seqlens=cu, num_blocks=num)
        return got.block_index, got.count, got.scores

    check_fullgraph(run, query, mean, cu, num)
