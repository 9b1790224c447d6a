"""topk_pages: the bits of select_pages of topk_blocks, in fewer launches."""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels as vico
from kit import emulation, tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import backends, checks
from vicostream_kernels.ops.append import KeySummary

BACKENDS = backends_of("topk_pages")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def moved(values: dict, device: str) -> dict:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in values.items()}


def check(name, device, query, summary, pages: dict, **options):
    """Both ways on one backend, and the reference's list of the same choice; (table, TopBlocks)."""
    query, summary = (
        x if x is None or isinstance(x, KeySummary)
        else tuple(part.to(device) for part in x) if isinstance(x, tuple)
        else x.to(device)
        for x in (query, summary)
    )  # fmt: skip
    pages, options = moved(pages, device), moved(options, device)
    table, found = vico.topk_pages(query, summary, **pages, **options, backend=name)
    alone = vico.topk_blocks(query, summary, **options, backend=name)
    for got, wanted in zip(vars(found).values(), vars(alone).values()):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.is_contiguous()
        assert_same_bits(got, wanted)
    listed = {k: None if v is None else v.cpu() for k, v in pages.items()}
    wanted = vico.select_pages(found.block_index.cpu(), **listed, backend="reference")
    assert table.dtype == torch.int32 and table.is_contiguous()
    assert torch.equal(table.cpu(), wanted)
    assert torch.equal(table, vico.select_pages(found.block_index, **pages, backend=name))
    return table, found


def lists(streams, blocks, width, *, most=40, sinks: int | None = 2, recent: int | None = 5):
    """Pages that several lists have: few numbers."""
    return {
        "block_pages": tensors.strided(tensors.ints((streams, blocks, width), -1, most, seed=21)),
        "sink_pages": None if sinks is None else tensors.ints((streams, sinks), -1, most, seed=22),
        "recent_pages": None
        if recent is None
        else tensors.ints((streams, recent), -1, most, seed=23),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["stream", "kv_head", "query_head"])
@pytest.mark.parametrize(
    "score,pool", [("dot", "mean"), ("cosine", "max"), ("bound", "mean"), ("dot", "softmax")]
)
def test_it_is_the_list_of_the_choice(score, pool, scope, backend):
    name, device = backend
    if name == "cuda" and pool == "softmax":
        pool = "max"
    query, low = tensors.randn((5, 4, 24), seed=1), tensors.randn((2, 23, 2, 2, 24), seed=2)
    low[1, 3] = torch.nan
    summary = (low, low + 1) if score == "bound" else low[:, :, 0]
    options = {
        "score": score, "pool": pool, "scope": scope,
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "num_blocks": torch.tensor([23, 6], dtype=torch.int32),
    }  # fmt: skip
    table, found = check(name, device, query, summary, lists(2, 23, 3), k=7, **options)
    assert found.count.flatten()[-1] == 6, "the second stream has no more blocks"
    assert (table[..., -1] == -1).all() and (table >= 0).sum(-1).min() > 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rule",
    [
        {"ratio": 0.3},
        {"token_budget": 12, "block_tokens": 3},
        {"token_budget": 20, "block_tokens": tensors.ints((2, 19), 0, 6, seed=3)},
        {"mass": 0.6},
        {"k": 6, "group": 3, "force_last": 1},
        {"k": 4, "max_blocks": 12, "min_k": 9, "force_first": 2},
    ],
    ids=lambda rule: ",".join(rule),
)
def test_every_rule(rule, backend):
    name, device = backend
    if name == "cuda" and "mass" in rule:
        rule = {"ratio": 0.9}
    scores = (tensors.randn((2, 3, 19), seed=4) * 2).round()
    options = {"external_score": scores, "scope": "kv_head", **rule}
    check(name, device, None, None, lists(2, 19, 2, sinks=None), **options)
    options = {"external_score": scores[:, 0], **rule}
    check(name, device, None, None, lists(2, 19, 2, recent=None), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks,width", [(0, 3), (4, 0), (1, 1)])
@pytest.mark.parametrize("extra", [None, 0, 3])
def test_next_to_nothing(extra, blocks, width, backend):
    name, device = backend
    pages = lists(2, blocks, width, sinks=extra, recent=extra)
    scores = tensors.randn((2, blocks), seed=5)
    table, _ = check(name, device, None, None, pages, external_score=scores, k=2)
    assert table.shape[-1] == 2 * width + 2 * (extra or 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_growing_summary(backend):
    name, device = backend
    total = tensors.randn((12, 2, 16), seed=6).contiguous().to(device)
    count = tensors.ints((12,), 1, 9, seed=7).to(device)
    query = tensors.randn((1, 4, 16), seed=8)
    check(name, device, query, KeySummary(sum=total, count=count), lists(1, 12, 2), k=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "blocks,k,width,own",
    [(300, 90, 6, False), (3000, 1000, 6, False), (3000, 1500, 6, True), (50_000, 700, 2, False)],
)
def test_long_lists(blocks, k, width, own, backend):
    """Lists that share memory with the keys, one beyond it, and a choice in two rounds."""
    name, device = backend
    if backends.INTERPRET:
        blocks, k = 300, 60
    scores = (tensors.randn((2, blocks), seed=9) * 50).round()
    pages = lists(2, blocks, width, most=3 * blocks, sinks=7, recent=70)
    before = launches()
    table, _ = vico.topk_pages(
        None, None, **moved(pages, device), external_score=scores.to(device), k=k, backend=name
    )
    made = launches() - before
    check(name, device, None, None, pages, external_score=scores, k=k)
    if name == "cuda" and emulation.ACTIVE:
        assert made == (2 if own or blocks > 20_000 else 1)


def launches() -> int:
    return emulation.module().launches() if emulation.ACTIVE else 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_launches_from_the_question_to_the_list(backend):
    name, device = backend
    if name == "cuda" and not emulation.ACTIVE:
        pytest.skip("launches are counted in the emulator")
    query, summary = tensors.randn((1, 40), seed=10), tensors.randn((1, 99, 40), seed=11)
    pages = moved(lists(1, 99, 2), device)
    before = launches()
    vico.topk_pages(query.to(device), summary.to(device), **pages, k=9, backend=name)
    assert launches() - before == (2 if name == "cuda" else 0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_lists_anew(backend):
    query, summary = tensors.randn((1, 64)).cuda(), tensors.randn((1, 500, 64), seed=1).cuda()
    pages = moved(lists(1, 500, 2, most=900), "cuda")

    def run():
        return vico.topk_pages(query, summary, **pages, k=9, backend=backend)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = run()
    for seed in (2, 3):
        query.copy_(tensors.randn((1, 64), seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(table.cpu(), run().cpu())


@pytest.mark.gpu
@needs_gpu
def test_several_streams_at_once_and_no_wait():
    summary = tensors.randn((1, 4096, 256), seed=1).cuda()
    queries = [tensors.randn((1, 256), seed=seed).cuda() for seed in range(4)]
    pages = moved(lists(1, 4096, 5, most=20_000, recent=40), "cuda")
    wanted = [vico.topk_pages(q, summary, **pages, k=64, backend="cuda")[0] for q in queries]
    torch.cuda.synchronize()
    sides = [torch.cuda.Stream() for _ in queries]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [[] for _ in queries]
        for _ in range(20):
            for query, side, tables in zip(queries, sides, found):
                with torch.cuda.stream(side):
                    tables.append(vico.topk_pages(query, summary, **pages, k=64, backend="cuda")[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for tables, table in zip(found, wanted):
        assert all(torch.equal(each, table) for each in tables)


# --- registration, bad input -------------------------------------------------------------------


def test_registration_and_fullgraph():
    query, mean = tensors.randn((4, 4, 16), torch.bfloat16), tensors.randn((2, 9, 2, 16))
    cu, num = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 4], [9, 5]))
    pages = lists(2, 9, 3)
    listed = tuple(pages.values())
    op = torch.ops.vicostream.topk_pages.default
    check_op(op, (query, mean, *listed, None, None, cu, num), {"k": 4, "scope": "kv_head"})
    check_op(op, (None, None, listed[0], None, None, None, None, None, num, mean[..., 0, 0]),
             {"mass": 0.5, "group": 2})  # fmt: skip
    check_refuses_grad(op, (query, mean, *listed, None, None, cu), {"k": 2})

    def run(query, mean, block_pages, recent, cu, num):
        table, found = vico.topk_pages(
            query, mean, block_pages, None, recent, ratio=0.3, pool="max", cu_seqlens=cu,
            num_blocks=num,
        )  # fmt: skip
        return table, found.block_index, found.count, found.scores

    check_fullgraph(run, query, mean, pages["block_pages"], pages["recent_pages"], cu, num)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"query": [1.0]}, TypeError, "topk_pages: query must be a tensor.*list"),
        ({"k": 0}, ValueError, "topk_pages: k=0 is outside"),
        ({"score": "bound"}, ValueError, "topk_pages: score='bound' needs"),
        ({"score": "bound", "summary": KeySummary.empty(5, 2, 8)}, ValueError, "topk_pages: score"),
        ({"summary": (torch.zeros(2),) * 3}, ValueError, "topk_pages: summary must be one"),
        ({"block_pages": None}, TypeError, "topk_pages: block_pages must be a tensor"),
        ({"block_pages": torch.zeros(2, 5, 3)}, TypeError, "block_pages has dtype float32"),
        ({"block_pages": torch.zeros(2, 6, 3).int()}, ValueError, "block_pages has shape.*NB=5"),
        ({"block_pages": torch.zeros(1, 5, 3).int()}, ValueError, "block_pages has shape.*S=2"),
        ({"sink_pages": torch.zeros(1, 2).int()}, ValueError, "sink_pages has shape.*S=2"),
        ({"recent_pages": torch.zeros(2).int()}, ValueError, "recent_pages must have 2 dim"),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
    ],
)
def test_bad_input_is_named(change, error, match):
    given = {
        "query": torch.zeros(2, 4, 8), "summary": torch.zeros(2, 5, 2, 8), "k": 2,
        "block_pages": torch.zeros(2, 5, 3).int(), **change,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        vico.topk_pages(given.pop("query"), given.pop("summary"), **given)


def test_check_mode_reads_values(monkeypatch):
    monkeypatch.setattr(checks, "CHECK_VALUES", True)
    query, summary = torch.zeros(2, 4, 8), torch.zeros(2, 5, 2, 8)
    pages = torch.zeros(2, 5, 3).int()
    with pytest.raises(ValueError, match=r"topk_pages: num_blocks=\[6, 0\] must lie in"):
        vico.topk_pages(query, summary, pages, k=2, num_blocks=torch.tensor([6, 0]).int())
    summary[1, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="topk_pages: 1 blocks score NaN"):
        vico.topk_pages(query, summary, pages, k=2)
