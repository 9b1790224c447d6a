"""summarize_blocks against plain loops in float64, and against summaries that grew."""

from __future__ import annotations

import pytest
import torch
from retrieve_keys import paged_keys

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from vicostream_kernels.ops.append import KeySummary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
