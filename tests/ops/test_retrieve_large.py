"""Retrieval beyond what the kernels keep in shared memory; graphs and streams on a device."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import emulation, tensors
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


def hard_scores(kind: str, rows: int, blocks: int) -> torch.Tensor:
    """Scores of which the best lie together or far apart, or are many of one value."""
    at = torch.arange(blocks)
    return {
        "rising": at * 0.25 - blocks / 3,
        "falling": (blocks - at) * 1e-3,
        "periodic": tensors.randn((rows, blocks), seed=3) + 9.0 * (at % 16 == 5),
        "close": 0.7 + 0.01 * tensors.randn((rows, blocks), seed=4),
        "coarse": tensors.ints((rows, blocks), -2, 3, seed=5).float(),
        "equal": torch.zeros(blocks),
        "nan": torch.full((blocks,), torch.nan),
        "few": torch.where(at % 4_001 == 17, 1.0, torch.nan),
    }[kind].float().expand(rows, blocks).clone()  # fmt: skip


@pytest.mark.skipif(SMALL, reason="sizes are what this is about")
@pytest.mark.parametrize("backend", backends_of("topk_blocks"))
@pytest.mark.parametrize(
    "kind,blocks,options,launches",
    [
        ("rising", 20_001, {"k": 1}, 2),
        ("falling", 20_001, {"k": 1_200, "force_first": 3, "force_last": 1}, 2),
        ("periodic", 33_000, {"k": 1_000}, 2),
        ("close", 40_002, {"k": 600, "force_last": 700}, 2),
        ("close", 90_001, {"k": 1_024}, 2),
        ("coarse", 25_003, {"k": 4_400}, 2),
        ("coarse", 61_000, {"k": 300, "group": 3, "force_last": 2}, 2),
        ("coarse", 30_000, {"ratio": 0.001, "min_k": 90, "max_blocks": 500}, 2),
        ("equal", 24_000, {"k": 77}, 2),
        ("nan", 24_000, {"k": 2_000, "force_last": 5}, 2),
        ("few", 31_000, {"k": 40}, 2),
        ("close", 20_100, {"k": 20_100}, 1),
        ("coarse", 20_100, {"k": 19_000}, 1),
    ],
    ids=str,
)
def test_the_best_wherever_they_lie(kind, blocks, options, launches, backend):
    """Four rows of two streams, of which one is far shorter, down to no block at all."""
    name, device = backend
    scores = hard_scores(kind, 4, blocks).view(2, 2, blocks)
    for fewer in (blocks // 7, 0):
        num = torch.tensor([blocks, fewer], dtype=torch.int32)
        options = {"scope": "kv_head", **options}
        wanted = vico.topk_blocks(
            None, None, external_score=scores, num_blocks=num, backend="reference", **options
        )
        before = emulation.module().launches() if emulation.ACTIVE else 0
        got = vico.topk_blocks(
            None, None, external_score=scores.to(device), num_blocks=num.to(device), backend=name,
            **options,
        )  # fmt: skip
        if emulation.ACTIVE and name == "cuda":
            assert emulation.module().launches() - before == launches
        assert torch.equal(got.count.cpu(), wanted.count)
        assert torch.equal(got.block_index.cpu(), wanted.block_index)
        assert_same_bits(got.scores.cpu(), wanted.scores)
        scores = scores.flip(0)


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
