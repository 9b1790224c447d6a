"""Retrieval beyond what the kernels keep in shared memory; graphs and streams on a device."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from vicostream_kernels import backends

#: The kernels place each chosen unit by counting those before it, so the work grows with the square
#: of the choice: hours in the interpreter, where several tiles and chunks of units do as well.
SMALL = backends.INTERPRET


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize(
    "rule",
    ({"k": 1000}, {"ratio": 0.7}, {"ratio": 0.01}, {"token_budget": 40_000}, {"k": 90, "group": 3}),
    ids=str,
)
def test_a_choice_among_many(backend, rule):
    """70,000 blocks, many of them equal; others have fewer, NaN among them."""
    name, device = backend
    blocks, *fewer = (1_100, 402, 10) if SMALL else (70_000, 20_123, 80)
    scores = (tensors.randn((3, blocks), seed=1) * 50).round()
    scores[1, ::7] = torch.nan
    options = {"num_blocks": torch.tensor([blocks, *fewer], dtype=torch.int32), **rule}
    options |= {"force_first": 4, "force_last": 5}
    if "token_budget" in rule:
        options["block_tokens"] = tensors.ints((3, blocks), 0, 9, seed=2)
        options["token_budget"] = rule["token_budget"] * blocks // 70_000

    def choose(name, device):
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
        return vico.topk_blocks(None, None, external_score=scores.to(device), backend=name, **moved)

    got, wanted = choose(name, device), choose("reference", "cpu")
    assert torch.equal(got.count.cpu(), wanted.count)
    assert torch.equal(got.block_index.cpu(), wanted.block_index)
    assert wanted.count[0] > fewer[-1]


@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize("pool", ("mean", "max"))
@pytest.mark.parametrize("score", ("dot", "cosine"))
def test_rows_too_long_to_keep(backend, score, pool):
    name, device = backend
    query, summary = tensors.randn((7, 10_501), seed=3), tensors.randn((2, 9, 10_501), seed=4)
    cu = torch.tensor([0, 2, 7], dtype=torch.int32)
    lone = vico.topk_blocks(
        query[:2].to(device), summary.to(device), k=3, score=score, pool=pool, backend=name
    )
    wanted = vico.topk_blocks(query[:2], summary, k=3, score=score, pool=pool, backend="reference")
    torch.testing.assert_close(lone.scores.cpu(), wanted.scores, rtol=1e-4, atol=1e-3)
    packed = vico.topk_blocks(
        query.to(device), summary.to(device), k=3, score=score, pool=pool,
        cu_seqlens=cu.to(device), backend=name,
    )  # fmt: skip
    wanted = vico.topk_blocks(
        query, summary, k=3, score=score, pool=pool, cu_seqlens=cu, backend="reference"
    )
    torch.testing.assert_close(packed.scores.cpu(), wanted.scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", backends_of("select_pages"))
@pytest.mark.parametrize("chosen", (40, 800, 1500))
def test_a_long_list_of_pages(backend, chosen):
    name, device = backend
    if SMALL:
        chosen = min(chosen, 90)
    pages = tensors.ints((2, 2000, 6), -1, 9000, seed=5)
    index = torch.stack([torch.arange(chosen), torch.arange(chosen) + 300]).int()
    sinks, recent = tensors.ints((2, 3), -1, 9000, seed=6), tensors.ints((2, 70), -1, 9000, seed=7)
    parts = (index, pages, sinks, recent)
    got = vico.select_pages(*(x.to(device) for x in parts), backend=name)
    assert torch.equal(got.cpu(), vico.select_pages(*parts, backend="reference"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_chooses_anew():
    query, summary = tensors.randn((1, 64)).cuda(), tensors.randn((1, 500, 64), seed=1).cuda()
    table = torch.arange(1000, dtype=torch.int32, device="cuda").view(1, 500, 2)

    def run():
        found = vico.topk_blocks(query, summary, k=9, backend="cuda")
        return vico.select_pages(found.block_index, table, backend="cuda")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pages = run()
    for seed in (2, 3):
        query.copy_(tensors.randn((1, 64), seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(pages.cpu(), run().cpu())
