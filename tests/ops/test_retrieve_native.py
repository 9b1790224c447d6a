"""What compiled retrieval must keep: its bits at any thread count, odd infinities, long rows."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from vicostream_kernels import backends
from vicostream_kernels.ops.append import KeySummary

BACKENDS = backends_of("topk_blocks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["mean", "max", "softmax"])
@pytest.mark.parametrize(
    "score,scope", [("dot", "stream"), ("cosine", "kv_head"), ("bound", "query_head")]
)  # noqa: E501
def test_one_and_two_threads_give_the_same_bits(score, scope, pool, backend):
    name, device = backend
    blocks = 40 if backends.INTERPRET else 403  # threads make no difference there
    low = tensors.randn((1, blocks, 2, 2, 72), seed=1).to(device)
    query = tensors.randn((9, 6, 72), torch.float16, seed=2).to(device)
    cu = torch.tensor([0, 9], dtype=torch.int32, device=device)
    summary = (low, low + 1) if score == "bound" else low[:, :, 0]
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(
                vico.topk_blocks(
                    query,
                    summary,
                    k=64,
                    score=score,
                    pool=pool,
                    scope=scope,
                    cu_seqlens=cu,
                    backend=name,
                )  # fmt: skip
            )
        finally:
            torch.set_num_threads(before)
    assert_same_bits(found[0].scores, found[1].scores)
    assert torch.equal(found[0].block_index, found[1].block_index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["stream", "kv_head", "query_head"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_a_running_sum_scores_like_its_mean(score, scope, backend):
    """To a rounding step: a backend may divide before or after the product, but not forget to."""
    name, device = backend
    total = tensors.randn((21, 2, 40), seed=3).contiguous().to(device)
    count = tensors.ints((21,), 1, 9, seed=4).to(device)
    count[5], total[5] = 0, 0
    query = tensors.randn((1, 4, 40), seed=5).to(device)
    options = {"k": 6, "score": score, "scope": scope, "backend": name}
    grown = vico.topk_blocks(query, KeySummary(sum=total, count=count), **options)
    mean = (total / count[:, None, None])[None]
    rebuilt = vico.topk_blocks(query, mean, **options)
    assert grown.scores[..., 5].isnan().all()
    torch.testing.assert_close(grown.scores, rebuilt.scores, equal_nan=True)
    assert torch.equal(grown.block_index, rebuilt.block_index)
    if name == "cpu":
        assert_same_bits(grown.scores, rebuilt.scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("heads,d", [(9, 128), (3, 248), (5, 24), (1, 8)])
def test_long_means_lie_together_or_head_by_head(heads, d, score, dtype, backend):
    """Several steps of every lane, whole and not; keys that stand apart in the pool or do not."""
    name, device = backend
    query = tensors.randn((2, 2 * heads, d), seed=10).to(device)
    apart = tensors.randn((2, 11, heads, d + 8), dtype, seed=11).to(device)[..., :d]
    together = apart.contiguous()
    odd = torch.empty(together.numel() + 1, dtype=dtype, device=device)[1:].view(together.shape)
    odd.copy_(together)
    q = query.double().view(2, heads, 2, d)
    truth = torch.einsum("sghd,sngd->sn", q, together.double())
    if score == "cosine":
        norms = q.flatten(1).norm(dim=-1)[:, None] * together.double().flatten(2).norm(dim=-1)
        truth = truth / (norms * 2**0.5)  # each key counts for two heads
    for summary in (together, apart, odd):
        got = vico.topk_blocks(query, summary, k=3, score=score, backend=name).scores
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["stream", "kv_head", "query_head"])
def test_infinite_keys_bound_as_defined(scope, backend):
    """max(q * kmin, q * kmax) takes one of them: an infinite other one must not make it NaN."""
    name, device = backend
    low = tensors.randn((1, 5, 1, 2, 16), seed=6)
    high = low + 1
    query = tensors.randn((1, 4, 16), seed=7).abs()
    low[0, 1, 0, 0, 3] = -torch.inf  # q > 0 never looks at the minimum
    high[0, 2, 0, 1, 5] = torch.inf
    query[0, :, 7] = -1
    high[0, 3, 0, 0, 7] = torch.inf  # nor q < 0 at the maximum
    got = vico.topk_blocks(
        query.to(device), (low.to(device), high.to(device)), k=2, score="bound", scope=scope,
        backend=name,
    ).scores.cpu()  # fmt: skip
    low, high, q = low[0, :, 0].double(), high[0, :, 0].double(), query[0].double()
    each = torch.where(
        q >= 0, q * high.repeat_interleave(2, 1), q * low.repeat_interleave(2, 1)
    ).sum(-1)
    rows = {"stream": 1, "kv_head": 2, "query_head": 4}[scope]
    truth = each.T.reshape(rows, -1, 5).sum(1)
    assert truth.isinf().any() and truth[:, 1].isfinite().all()
    torch.testing.assert_close(got.double().view(rows, 5), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 64, 1000, 2999])
@pytest.mark.parametrize("order", ["rising", "falling", "random", "coarse", "equal"])
def test_long_rows_in_any_order(order, k, backend):
    name, device = backend
    n = 3000
    if backends.INTERPRET:  # work grows with k * n; this is several tiles of everything as well
        n, k = 600, max(1, k // 5)
    scores = {
        "rising": torch.arange(n) - n / 2,
        "falling": -torch.arange(n) + n / 2,
        "random": tensors.randn((n,), seed=8),
        "coarse": tensors.ints((n,), -3, 4, seed=9),
        "equal": torch.zeros(n),
    }[order].float()
    scores[::7] = torch.nan
    key = scores.double().nan_to_num(nan=-1e9)
    wanted = key.sort(descending=True, stable=True).indices[:k].sort().values
    rules = [{"k": k}, {"token_budget": 3 * k + 2, "block_tokens": torch.full((1, n), 3).int()}]
    for rule in rules:
        if "block_tokens" in rule:
            rule["block_tokens"] = rule["block_tokens"].to(device)
        got = vico.topk_blocks(
            None, None, external_score=scores[None].to(device), backend=name, **rule
        )
        assert got.count.tolist() == [k]
        assert got.block_index[0, :k].tolist() == wanted.tolist()
