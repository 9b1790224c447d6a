"""summarize_blocks and the scores of topk_blocks, against plain loops in float64."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import backends, checks
from vicostream_kernels.ops.append import KeySummary
from vicostream_kernels.reference import retrieve as reference
from vicostream_kernels.reference._precision import accumulate_in

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCORES, POOLS, SCOPES = ("dot", "cosine", "bound"), ("mean", "max", "softmax"), (
    "stream", "kv_head", "query_head",
)  # fmt: skip


# --- summaries ---------------------------------------------------------------------------------


def paged_keys(dtype: torch.dtype, *, page_size: int = 5, seed: int = 0):
    """A pool with NaN in every slot that no token fills, blocks of 0 to 3 pages, a ragged table."""
    pages, heads, d = 11, 2, 8
    k_pages = tensors.randn((pages, page_size, heads, d), dtype, seed=seed)
    fill = tensors.ints((pages,), 1, page_size + 1, seed=seed + 1)
    fill[3] = 0
    for page in range(pages):
        k_pages[page, int(fill[page]) :] = torch.nan
    table = torch.tensor(
        [
            [[4, 2, -1], [-1, -1, -1], [0, 7, 9], [3, -1, -1]],
            [[10, -1, -1], [6, 99, 8], [-1, 1, -1], [3, 5, -1]],
        ],
        dtype=torch.int32,
    )
    return k_pages, tensors.strided(table), fill


def tokens_of(k_pages, pages, fill):
    """[(offset, key [G, d] float64)] of a block, in order."""
    return [
        (offset, k_pages[page, offset].double())
        for page in pages.tolist()
        if 0 <= page < k_pages.shape[0]
        for offset in range(int(fill[page]))
    ]


@pytest.mark.parametrize("backend", backends_of("summarize_blocks"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_of_each_block(dtype, backend):
    name, device = backend
    k_pages, table, fill = paged_keys(dtype)
    got = vico.summarize_blocks(*(x.to(device) for x in (k_pages, table, fill)), backend=name).cpu()
    assert got.dtype == torch.float32
    truth = torch.full_like(got, torch.nan, dtype=torch.float64)
    for s, b in [(s, b) for s in range(2) for b in range(4)]:
        keys = [key for _, key in tokens_of(k_pages, table[s, b], fill)]
        if keys:
            truth[s, b] = torch.stack(keys).mean(0)
    assert truth[0, 1].isnan().all() and truth[0, 3].isnan().all(), "the test has no empty block"
    # Ten additions in float32 at most; the keys themselves are exact in it.
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("backend", backends_of("summarize_blocks"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size,sub", [(5, 1), (5, 2), (5, 5), (8, 4), (1, 1)])
def test_minmax_of_each_part(page_size, sub, dtype, backend):
    name, device = backend
    k_pages, table, fill = paged_keys(dtype, page_size=page_size, seed=3)
    arguments = [x.to(device) for x in (k_pages, table, fill)]
    kmin, kmax = (
        x.cpu() for x in vico.summarize_blocks(*arguments, kind="minmax", sub=sub, backend=name)
    )
    for s, b in [(s, b) for s in range(2) for b in range(4)]:
        parts: dict[int, list[torch.Tensor]] = {}
        for offset, key in tokens_of(k_pages, table[s, b], fill):
            parts.setdefault(offset * sub // page_size, []).append(key)
        for part in range(sub):
            keys = parts.get(part)
            low, high = (torch.inf, -torch.inf) if keys is None else (
                torch.stack(keys).amin(0), torch.stack(keys).amax(0),
            )  # fmt: skip
            assert (kmin[s, b, part].double() == low).all()
            assert (kmax[s, b, part].double() == high).all()


@pytest.mark.parametrize("raw", [False, True])
def test_growing_and_rebuilt_summaries_have_the_same_bits(raw):
    pages, page_size, heads, d, tokens = 6, 4, 2, 16, 13
    pools = [torch.zeros(pages, page_size, heads, d, dtype=torch.bfloat16) for _ in range(3)]
    summary = KeySummary.empty(2, heads, d, kind="both", sub=2, source="raw" if raw else "rotated")
    # Block 0 has pages 5 and 2, block 1 pages 0 and 1, which come in three calls.
    slots = torch.tensor([20, 21, 22, 23, 8, 9, 0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    owner = torch.tensor([1, 1, 0, -1, -1, 0], dtype=torch.int32)
    q, k, v = (tensors.randn((tokens, heads, d), torch.bfloat16, seed=i) for i in range(3))
    positions = tensors.ints((3, tokens), 0, 90_000, seed=4)
    inv_freq = 10_000 ** (-torch.arange(0, d, 2) / d)
    for part in (slice(0, 7), slice(7, 8), slice(8, 13)):
        vico.rope_append(
            q[part], k[part], v[part], positions[:, part], inv_freq, None, pools[0], pools[1],
            slots[part], raw_k_pages=pools[2], summary=summary, block_of_page=owner,
            backend="reference",
        )  # fmt: skip
    fill = torch.tensor([4, 3, 2, 0, 0, 4], dtype=torch.int32)
    table = torch.tensor([[[5, 2], [0, 1]]], dtype=torch.int32)
    pool = pools[2] if raw else pools[0]
    mean = vico.summarize_blocks(pool, table, fill, backend="reference")
    kmin, kmax = vico.summarize_blocks(pool, table, fill, "minmax", 2, backend="reference")
    assert_same_bits(mean[0], summary.sum / summary.count[:, None, None])
    assert_same_bits(kmin[0], summary.kmin)
    assert_same_bits(kmax[0], summary.kmax)
    question = tensors.randn((1, 4, d), seed=9)
    for score, rebuilt in (("dot", mean), ("cosine", mean), ("bound", (kmin, kmax))):
        grown = vico.topk_blocks(question, summary, k=1, score=score, backend="reference")
        again = vico.topk_blocks(question, rebuilt, k=1, score=score, backend="reference")
        assert_same_bits(grown.scores, again.scores)
        assert grown.block_index.tolist() == again.block_index.tolist()


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
    shares = choose(4, pool="softmax")
    assert shares.scores[0].isnan().tolist() == [False, True, False, True, False, False]
    torch.testing.assert_close(shares.scores.nansum().cpu(), torch.tensor(1.0))
    assert choose(2, pool="max").scores[0].isnan().sum() == 2


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
    half = torch.float16 if backends.INTERPRET else torch.bfloat16  # wrong in the interpreter
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


# --- registration, bad input -------------------------------------------------------------------


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


def good() -> dict:
    return {
        "query": torch.zeros(2, 4, 8), "summary": torch.zeros(2, 5, 2, 8), "k": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"query": [1.0]}, TypeError, "query must be a tensor.*list"),
        ({"query": None}, TypeError, "query must be a tensor.*NoneType"),
        ({"query": torch.zeros(2, 4, 8).int()}, TypeError, "query has dtype int32"),
        ({"query": torch.zeros(3, 4, 8)}, ValueError, r"summary has shape .*S=3"),
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "H=3 heads.*multiple of.*G=2"),
        ({"query": torch.zeros(2, 4, 12), "summary": torch.zeros(2, 5, 2, 12)}, ValueError, "head dim 12"),  # noqa: E501
        ({"query": torch.zeros(2, 8)}, ValueError, "summary must have 3 dim"),
        ({"query": torch.zeros(2, 0), "summary": torch.zeros(2, 5, 0)}, ValueError, "D, .*=0 is"),
        ({"query": torch.zeros(2, 8), "scope": "kv_head"}, ValueError, "has no heads.*kv_head"),
        ({"summary": torch.zeros(2, 5, 2, 16)}, ValueError, "summary has shape"),
        ({"summary": (torch.zeros(2, 5, 1, 2, 8),) * 2}, ValueError, "summary must have 4 dim"),
        ({"summary": (torch.zeros(2, 5, 1, 2, 8),) * 3}, ValueError, "one tensor or .*3 parts"),
        ({"score": "bound", "summary": torch.zeros(2, 5, 1, 2, 8)}, ValueError, "needs a .kmin, kmax"),  # noqa: E501
        ({"score": "bound", "summary": KeySummary.empty(5, 2, 8)}, ValueError, "needs a KeySummary with kmin"),  # noqa: E501
        ({"score": "l2"}, ValueError, "score='l2'.*'dot'"),
        ({"pool": "sum"}, ValueError, "pool='sum'"),
        ({"scope": "layer"}, ValueError, "scope='layer'"),
        ({"sm_scale": 0.1}, ValueError, "sm_scale=0.1 needs pool='softmax'"),
        ({"k": None}, ValueError, "exactly one of k, ratio, mass, token_budget, got none"),
        ({"ratio": 0.5}, ValueError, "exactly one of.*got k, ratio"),
        ({"k": 0}, ValueError, "k=0 is outside"),
        ({"k": None, "ratio": 0.0}, ValueError, r"ratio=0.0 is outside \(0, 1\]"),
        ({"k": None, "mass": 1.5}, ValueError, "mass=1.5 is outside"),
        ({"k": None, "ratio": float("nan")}, ValueError, "ratio=nan"),
        ({"k": None, "token_budget": 64}, ValueError, "token_budget=64 needs block_tokens"),
        ({"k": None, "token_budget": -1, "block_tokens": 4}, ValueError, "token_budget=-1"),
        ({"k": None, "token_budget": 64, "block_tokens": 0}, ValueError, "tokens_per_block=0"),
        ({"block_tokens": 16}, ValueError, "block_tokens goes with token_budget.*got k=2"),
        ({"k": None, "mass": 0.5, "block_tokens": 3}, ValueError, "block_tokens goes with"),
        ({"k": 3, "group": 2}, ValueError, "k=3 counts blocks.*group=2"),
        ({"group": 0}, ValueError, "group=0"),
        ({"min_k": -1}, ValueError, "min_k=-1"),
        ({"force_last": -1}, ValueError, "force_last=-1"),
        ({"max_blocks": 0}, ValueError, "max_blocks=0 is less than"),
        ({"max_blocks": 2, "force_first": 2, "force_last": 1}, ValueError, "max_blocks=2.*3 blocks"),  # noqa: E501
        ({"num_blocks": torch.tensor([1, 2])}, TypeError, "num_blocks has dtype int64"),
        ({"num_blocks": torch.zeros(3).int()}, ValueError, "num_blocks has shape"),
        ({"cu_seqlens": torch.zeros(2).int()}, ValueError, r"cu_seqlens has 2 entries.*S\+1=3"),
        ({"external_score": torch.zeros(2, 5)}, ValueError, "takes the place of query"),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, match):
    given = {**good(), **change}
    with pytest.raises(error, match=match):
        vico.topk_blocks(given.pop("query"), given.pop("summary"), **given)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"kind": "max"}, ValueError, "kind='max'"),
        ({"sub": 6, "kind": "minmax"}, ValueError, r"sub=6 is outside \[1, 5\]"),
        ({"sub": 2}, ValueError, "sub=2 needs kind='minmax'"),
        ({"page_fill": torch.zeros(4).int()}, ValueError, "page_fill has shape .*P=11"),
        ({"block_pages": torch.zeros(1, 2, 3)}, TypeError, "block_pages has dtype float32"),
        ({"k_pages": torch.zeros(11, 5, 2, 12)}, ValueError, "head dim 12"),
    ],
)
def test_bad_summaries_are_named(change, error, match):
    k_pages, table, fill = paged_keys(torch.float32)
    with pytest.raises(error, match=match):
        vico.summarize_blocks(
            **{"k_pages": k_pages, "block_pages": table, "page_fill": fill, **change}
        )  # noqa: E501


def test_check_mode_reads_values(monkeypatch):
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    given = good()
    query, summary, k = given["query"], given["summary"], 2
    with pytest.raises(ValueError, match=r"num_blocks=\[6, 0\] must lie in \[0, NB=5\]"):
        vico.topk_blocks(query, summary, k=k, num_blocks=torch.tensor([6, 0], dtype=torch.int32))
    cu = torch.tensor([0, 2, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens=.0, 2, 1. must ascend"):
        vico.topk_blocks(query, summary, k=k, cu_seqlens=cu)
    cu = torch.tensor([0, 2, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="gives a stream no query token"):
        vico.topk_blocks(query, summary, k=k, cu_seqlens=cu)
    sizes = torch.tensor([[1, 1, -3, 1, 1]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_tokens holds -3"):
        vico.topk_blocks(query, summary, token_budget=4, block_tokens=sizes)
    summary[1, 3, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"1 blocks score NaN.*\[\[1, 3\]\]"):
        assert vico.topk_blocks(query, summary, k=5).block_index[1].tolist() == [0, 1, 2, 3, 4]
    k_pages, table, fill = paged_keys(torch.float32)
    with pytest.raises(ValueError, match=r"block_pages holds 99, allowed: -1 or \[0, 11\)"):
        vico.summarize_blocks(k_pages, table, fill)
    index = torch.tensor([[0, 7]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_index holds 7, allowed: -1 or \[0, 4\)"):
        vico.select_pages(index, table)
