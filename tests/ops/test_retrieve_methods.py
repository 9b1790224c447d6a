"""Published selectors as arguments of topk_blocks, each recomputed here in its own words."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of

BACKENDS = backends_of("topk_blocks")
HEADS, GROUPS, DIM = 6, 2, 16


def pool_of_keys(pages: int, page_size: int, seed: int = 0, full: bool = False):
    """(k_pages, page_fill); partly filled pages unless ``full``, NaN where there is no token."""
    k_pages = tensors.randn((pages, page_size, GROUPS, DIM), seed=seed)
    fill = tensors.ints((pages,), 1, page_size + 1, seed=seed + 1)
    if full:
        fill[:] = page_size
    for page in range(pages):
        k_pages[page, int(fill[page]) :] = torch.nan
    return k_pages, fill


def block_keys(k_pages, fill, table) -> list[torch.Tensor]:
    """The keys [tokens, G, d] of each block, float64."""
    return [
        torch.cat([k_pages[p, : fill[p]] for p in row.tolist() if p >= 0]).double() for row in table
    ]


def top(scores: torch.Tensor, k: int) -> list[int]:
    return sorted(scores.topk(min(k, scores.numel())).indices.tolist())


def chosen(found: vico.TopBlocks) -> list:
    """block_index without its padding, as nested lists."""

    def strip(x):
        return [i for i in x if i >= 0] if not x or isinstance(x[0], int) else [strip(i) for i in x]

    return strip(found.block_index.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [9, 200])
def test_vicostream(chunks, backend):
    """Mean input embedding of each chunk's kept tokens, cosine with the mean of the question's."""
    name, device = backend
    width, k = 96, 64
    sizes = tensors.ints((chunks,), 1, 40, seed=chunks).tolist()
    embeds = [tensors.randn((n, width), seed=i) for i, n in enumerate(sizes)]
    question = tensors.randn((17, width), seed=999)
    means = torch.stack([e.double().mean(0) for e in embeds])
    wanted = top(torch.cosine_similarity(question.double().mean(0)[None], means), k)

    capacity = chunks + 8  # the table grows in steps; its spare rows hold anything
    table = torch.full((1, capacity, width), torch.nan)
    table[0, :chunks] = torch.stack([e.mean(0) for e in embeds])
    got = vico.topk_blocks(
        question.to(device), table.to(device), k=k, score="cosine",
        cu_seqlens=torch.tensor([0, 17], dtype=torch.int32, device=device),
        num_blocks=torch.tensor([chunks], dtype=torch.int32, device=device), backend=name,
    )  # fmt: skip
    assert chosen(got) == [wanted] and got.count.tolist() == [min(k, chunks)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 4])
def test_rekv(group, backend):
    """Mean un-rotated key, KV heads expanded and concatenated; dot with the mean question query."""
    name, device = backend
    frames, k = 22, 8
    k_pages, fill = pool_of_keys(frames * 3, 5, seed=2)
    table = torch.randperm(frames * 3, generator=torch.Generator().manual_seed(3)).int()
    table = table.view(1, frames, 3)
    table[0, 4, 2] = -1  # a shorter frame
    question = tensors.randn((11, HEADS, DIM), seed=4)

    expanded = [
        keys.repeat_interleave(HEADS // GROUPS, dim=1).flatten(1).mean(0)
        for keys in block_keys(k_pages, fill, table[0])
    ]
    logits = torch.stack(expanded) @ question.double().mean(0).flatten()
    units = torch.stack([part.mean() for part in logits.split(group)])
    wanted = [b for u in top(units, k // group) for b in range(u * group, (u + 1) * group)]
    wanted = [b for b in wanted if b < frames]

    means = vico.summarize_blocks(*(x.to(device) for x in (k_pages, table, fill)), backend=name)
    got = vico.topk_blocks(
        question.to(device), means, k=k, group=group, backend=name,
        cu_seqlens=torch.tensor([0, 11], dtype=torch.int32, device=device),
    )  # fmt: skip
    assert chosen(got) == [wanted]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget,force_last", [(64, 1), (64, 0), (16, 1), (0, 0)])
def test_quest(budget, force_last, backend):
    """q+ . kmax + q- . kmin per query head; max(3, budget // 16) pages, the last one by option."""
    name, device = backend
    pages, page_size = 13, 16
    k_pages, fill = pool_of_keys(pages, page_size, seed=5)
    table = torch.arange(pages, dtype=torch.int32).view(1, pages, 1)
    query = tensors.randn((1, HEADS, DIM), seed=6)
    keys = block_keys(k_pages, fill, table[0])
    low = torch.stack([key.amin(0) for key in keys]).repeat_interleave(HEADS // GROUPS, dim=1)
    high = torch.stack([key.amax(0) for key in keys]).repeat_interleave(HEADS // GROUPS, dim=1)
    q = query[0].double()
    bound = (q.clamp_min(0) * high + q.clamp_max(0) * low).sum(-1).T
    take = max(3, budget // page_size)
    wanted = []
    for h in range(HEADS):
        if force_last:  # the CUDA code: the best of the others, and the last page
            wanted.append(sorted([*top(bound[h, :-1], take - 1), pages - 1]))
        else:
            wanted.append(top(bound[h], take))

    summary = vico.summarize_blocks(
        *(x.to(device) for x in (k_pages, table, fill)), kind="minmax", backend=name
    )
    got = vico.topk_blocks(
        query.to(device), summary, token_budget=budget, block_tokens=page_size, min_k=3,
        force_last=force_last, score="bound", scope="query_head", backend=name,
    )  # fmt: skip
    assert got.block_index.shape == (1, HEADS, take)
    assert chosen(got) == [wanted]
    assert got.count.tolist() == [[take] * HEADS]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lserve(backend):
    """Four sub-pages with a bound each, their maximum is the page's; the last page always."""
    name, device = backend
    pages, page_size, sub = 17, 8, 4
    k_pages, fill = pool_of_keys(pages, page_size, seed=7, full=True)
    table = torch.arange(pages, dtype=torch.int32).flip(0).view(1, pages, 1)
    query = tensors.randn((1, HEADS, DIM), seed=8)
    bound = torch.empty(HEADS, pages, dtype=torch.float64)
    for h in range(HEADS):
        q = query[0, h].double()
        for b in range(pages):
            page = k_pages[table[0, b, 0], :, h // (HEADS // GROUPS)].double()
            logical = page.view(sub, page_size // sub, DIM)
            each = torch.maximum(q * logical.amin(1), q * logical.amax(1)).sum(-1)
            bound[h, b] = each.max()
    wanted = [sorted([*top(bound[h, :-1], 4), pages - 1]) for h in range(HEADS)]

    summary = vico.summarize_blocks(
        *(x.to(device) for x in (k_pages, table, fill)), kind="minmax", sub=sub, backend=name
    )
    got = vico.topk_blocks(
        query.to(device), summary, token_budget=5 * page_size, block_tokens=page_size, min_k=3,
        force_last=1, score="bound", scope="query_head", backend=name,
    )  # fmt: skip
    assert chosen(got) == [wanted]


@pytest.mark.parametrize("backend", BACKENDS)
def test_livevlm(backend):
    """Attention of each question token and head over the page means, averaged; the best 40 %."""
    name, device = backend
    pages = 23
    k_pages, fill = pool_of_keys(pages, 16, seed=9)
    table = torch.arange(pages, dtype=torch.int32).view(1, pages, 1)
    question = tensors.randn((7, HEADS, DIM), seed=10)
    means = torch.stack([key.mean(0) for key in block_keys(k_pages, fill, table[0])])
    means = means.repeat_interleave(HEADS // GROUPS, dim=1)
    attention = (torch.einsum("thd,nhd->thn", question.double(), means) / DIM**0.5).softmax(-1)
    wanted = top(attention.mean((0, 1)), int(0.4 * pages))

    summary = vico.summarize_blocks(*(x.to(device) for x in (k_pages, table, fill)), backend=name)
    got = vico.topk_blocks(
        question.to(device), summary, ratio=0.4, pool="softmax", backend=name,
        cu_seqlens=torch.tensor([0, 7], dtype=torch.int32, device=device),
    )  # fmt: skip
    assert got.block_index.shape == (1, 9) and chosen(got) == [wanted]
    torch.testing.assert_close(
        got.scores[0].cpu().double(), attention.mean((0, 1)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamingtom(backend):
    """Mean key of a 50-token group, cosine with the query per KV head's vector; top k groups."""
    name, device = backend
    groups, k = 12, 3
    k_pages, fill = pool_of_keys(groups * 4, 13, seed=11)
    table = torch.arange(groups * 4, dtype=torch.int32).view(1, groups, 4)
    query = tensors.randn((1, GROUPS, DIM), seed=12)
    means = torch.stack([key.mean(0) for key in block_keys(k_pages, fill, table[0])])
    wanted = [
        top(torch.cosine_similarity(query[0, g].double()[None], means[:, g]), k)
        for g in range(GROUPS)
    ]
    summary = vico.summarize_blocks(*(x.to(device) for x in (k_pages, table, fill)), backend=name)
    got = vico.topk_blocks(
        query.to(device), summary, k=k, score="cosine", scope="kv_head", backend=name
    )
    assert chosen(got) == [wanted]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vrex(backend):
    """Descending scores are taken until score x tokens reaches 0.3 of the sum of positive ones."""
    name, device = backend
    scores = tensors.randn((2, 3, 40), seed=13)
    sizes = tensors.ints((2, 40), 1, 9, seed=14)
    wanted = []
    for s in range(2):
        rows = []
        for r in range(3):
            weight = scores[s, r].double().clamp_min(0) * sizes[s]
            taken, reached = [], 0.0
            for b in scores[s, r].argsort(descending=True).tolist():
                if reached >= 0.3 * float(weight.sum()):
                    break
                reached += float(weight[b])
                taken.append(b)
            rows.append(sorted(taken))
        wanted.append(rows)
    assert len({len(row) for rows in wanted for row in rows}) > 1, "counts should differ by row"
    got = vico.topk_blocks(
        None, None, external_score=scores.to(device), scope="query_head", mass=0.3,
        block_tokens=sizes.to(device), max_blocks=32, backend=name,
    )  # fmt: skip
    assert chosen(got) == wanted
    assert got.count.tolist() == [[len(row) for row in rows] for rows in wanted]
