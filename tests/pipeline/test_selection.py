"""The selector protocol: what a question reads is what its selector says, whoever that is."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from math import inf, nan

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.methods import RetrieveRule
from vicostream_kernels.models import Qwen2_5_VLRunner
from vicostream_kernels.ops.retrieve import select_pages, topk_blocks
from vicostream_kernels.pipeline import selection
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.selection import Asked, Rows, RuleSelector, chosen_rows


@dataclass
class Fixed:
    """Reads the rows it was made with; remembers what it was told."""

    rows: list[int]
    per_layer: bool = False
    asked: list[Asked] = field(default_factory=list)

    def select(self, asked):
        self.asked.append(asked)
        return chosen_rows(self.rows, asked.rows)


def answer_of(stream, selector, **options):
    answer = stream.ask("What is this?", selector=selector, max_new_tokens=3, **options)
    return "".join(answer), answer.figures


def listed_pages(monkeypatch, stream, selector):
    """The page table of the prompt's forward, without padding."""
    seen, original = [], Qwen2_5_VLRunner.forward

    def forward(self, embeds, positions, attend, outputs="all"):
        seen.append(attend.page_table)
        return original(self, embeds, positions, attend, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2_5_VLRunner, "forward", forward)
        _, figures = answer_of(stream, selector)
    return [page for page in seen[0][0].tolist() if page >= 0], figures


def test_a_selector_decides_what_is_read(monkeypatch):
    with small_engine(prune__threshold=0.9, retrieve__k=2) as made, made.open() as stream:
        stream.ingest(pictures(56))
        blocks = stream.history.chunks()
        selector = Fixed([5, 0, 3])
        pages, figures = listed_pages(monkeypatch, stream, selector)
        expected = stream.history.preamble.pages[:]
        for row in (0, 3, 5):
            expected += blocks[row].body.pages
        expected += blocks[-1].segments[2].pages
        assert pages[: len(expected)] == expected
        assert figures.blocks == [(blocks[r].start_s, blocks[r].end_s) for r in (0, 3, 5)]
        (asked,) = selector.asked
        assert asked.layer is None and asked.step == 0 and len(asked.rows) == 7
        assert asked.rows.blocks == tuple(blocks)
        assert asked.rows.tokens == tuple(block.body_tokens for block in blocks)
        embeds = made.runner.embed(torch.tensor(made.runner.question_ids("What is this?")))
        torch.testing.assert_close(asked.query, embeds.mean(0, keepdim=True))
        assert asked.summary.shape == (1, 7, made.runner.hidden_size)


def test_select_is_all_that_a_selector_needs():
    class Last:
        def select(self, asked):
            return chosen_rows([len(asked.rows) - 1], asked.rows)

    class Wrong:
        def select(self, asked):
            return [0]

    with small_engine(prune__threshold=0.9, retrieve__k=2) as made, made.open() as stream:
        stream.ingest(pictures(24))
        _, figures = answer_of(stream, Last())
        last = stream.history.chunks()[-1]
        assert figures.blocks == [(last.start_s, last.end_s)]
        with pytest.raises(TypeError, match="Wrong.select must return TopBlocks, got list"):
            answer_of(stream, Wrong())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be an int of at least 1"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5 must be an int"),
        (dict(time_s="1:05"), "time_s='1:05' must be finite seconds"),
        (dict(time_s=10**400), "time_s=10+ must be finite seconds"),
    ],
)
def test_what_ask_takes(asked, said):
    with small_engine() as made, made.open() as stream:
        with pytest.raises(InputError, match=said):
            stream.ask("What?", **asked)


def test_a_selector_may_read_nothing():
    with small_engine(prune__threshold=0.9, retrieve__k=2) as made, made.open() as stream:
        stream.ingest(pictures(24))
        text, figures = answer_of(stream, Fixed([]))
        assert figures.blocks == [] and figures.tokens == 3
        assert "answer" in stream.report()["questions"][0]


def test_the_rule_is_a_selector_like_any_other():
    """Handing over the rows that the rule chooses gives the same answer; other rows need not."""
    with small_engine(prune__threshold=0.9, retrieve__k=2) as made, made.open() as stream:
        stream.ingest(pictures(48))
        blocks = stream.history.chunks()
        text, figures = answer_of(stream, None)
        spans = [(block.start_s, block.end_s) for block in blocks]
        rows = [spans.index(span) for span in figures.blocks]
        assert len(rows) == 2
        assert answer_of(stream, Fixed(rows))[0] == text
        past = Fixed([1])
        assert answer_of(stream, past, time_s=blocks[2].end_s)[1].blocks == [spans[1]]
        assert len(past.asked[0].rows) == 3


def test_rows_that_are_not_there_are_not_read():
    with small_engine(retrieve__k=2) as made, made.open() as stream:
        before = answer_of(stream, selector := Fixed([0]))
        assert not selector.asked and before[1].blocks == []
        stream.ingest(pictures(24))
        _, figures = answer_of(stream, Fixed([-1, 1, 99]))
        assert len(figures.blocks) == 1


def test_a_selector_needs_a_method_that_retrieves():
    with small_engine("full-history") as made, made.open() as stream:
        with pytest.raises(InputError, match="a method that retrieves"):
            stream.ask("What?", selector=Fixed([0]))


@dataclass
class Span:
    start_s: float
    end_s: float


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("k, force_last", [(3, 0), (4, 1)])
def test_of_relevant_blocks_the_newest_are_read(k, force_last, score):
    random = torch.Generator().manual_seed(3)
    blocks = tuple(Span(2.0 * n, 2.0 * n + 1.75) for n in range(40))
    rows = Rows(blocks, (36,) * 40, torch.arange(40, dtype=torch.int32).view(1, 40, 1))
    query, means = (torch.randn(n, 8, generator=random) for n in (1, 40))
    for best, size in ((2, 4.0), (17, 3.0), (31, 2.5)):  # the older, the more alike
        means[best] = size * query[0] + 2 / size * torch.randn(8, generator=random)
    scores = (means @ query[0]).double()
    if score == "cosine":
        scores = torch.cosine_similarity(means.double(), query.double())

    def chosen(**settings):
        rule = RetrieveRule(**{"k": k, "force_last": force_last, "score": score, **settings})
        return RuleSelector(rule, 16).select(Asked(rows, 70.0, None, 0, query, means[None]))

    def read(**settings):
        return [n for n in chosen(**settings).block_index[0].tolist() if n >= 0]

    for spread in (0.0, 1.0, 2.5, 4.0, 100.0):
        one_scene = 0.01 * (scores.max() - scores.min())
        counted = [0] + [n for n in range(1, 40) if abs(scores[n] - scores[n - 1]) > one_scene]
        middle = statistics.median_low(scores[counted].tolist())
        spreads = statistics.median_low((scores[counted] - middle).abs().tolist())
        least = middle + max(spread * spreads, 0.1 * (scores.max() - middle)) - 1e-9
        relevant = [n for n in range(40) if scores[n] >= least]
        others = sorted(set(range(40)) - set(relevant), key=lambda n: -scores[n])
        newest = list(range(40 - force_last, 40))
        order = [n for n in (*relevant[::-1], *others) if n not in newest]
        expected = sorted([*newest, *order[: k - force_last]])
        assert read(relevant=spread) == expected
        assert read(relevant=spread, k=None, token_budget=36 * k) == expected
    assert 2 in read() and 2 in read(relevant=100.0) and 2 not in read(relevant=0.5)
    reported = chosen(relevant=1.0).scores[0]
    torch.testing.assert_close(reported, scores.float(), msg="reported as they are, not as ranks")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_best_of_many_that_do_not_stand_out_is_read(backend):
    """Cosines of real models have one hump: what stands out of it are few, the best among them."""
    found = 0
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        scores = 0.3 + 0.03 * torch.randn(1000, generator=random)
        ranks = selection._newest_relevant(scores[None], 4.0)
        chosen = topk_blocks(None, None, external_score=ranks, k=17, force_last=1, backend=backend)
        found += int(scores.argmax()) in chosen.block_index[0].tolist()
    assert found == 50


@pytest.mark.parametrize("noise", [0.0, 1e-3, 2e-2])
def test_what_stands_out_of_a_scene_without_change_is_read(noise):
    """Its scores spread by nothing, or by noise that lies far out in its own measure."""
    random = torch.Generator().manual_seed(1)
    scores = 0.1 + noise * torch.randn(2000, generator=random)
    scores[[3, 7, 90]] = torch.tensor([0.9, 0.8, 0.7])
    ranks = selection._newest_relevant(scores[None], 3.0)[0]
    assert {3, 7, 90} <= set(ranks.topk(5).indices.tolist())
    if not noise:
        assert ranks.argsort(stable=True).tolist()[-3:] == [3, 7, 90], "of those by age"


@pytest.mark.parametrize(
    ("scores", "ranked"),
    [
        ([5.0], [0]),
        ([2.0, 2.0, 2.0, 2.0], [0, 1, 2, 3]),  # nothing stands out of equals: all are, by age
        ([nan, 1.0, nan, 1.0], [1, 3]),
        ([nan, nan], []),
        ([1.0, inf, 2.0, 1.5, 1.2], [0, 4, 3, 2, 1]),
        ([-inf, -inf, -inf, 0.5, 0.4], [0, 1, 2, 4, 3]),
        ([1e9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 2, 3, 4, 5, 6, 0]),
    ],
)
def test_scores_of_any_size_keep_an_order(scores, ranked):
    ranks = selection._newest_relevant(torch.tensor([scores]), 4.0)[0]
    assert torch.equal(ranks.isnan(), torch.tensor(scores).isnan())
    order = [n for n in ranks.argsort(stable=True).tolist() if not ranks[n].isnan()]
    assert order == ranked


def test_a_score_that_is_no_number_is_never_relevant():
    rows = Rows(
        tuple(Span(float(n), n + 0.75) for n in range(6)),
        (36,) * 6,
        torch.arange(6, dtype=torch.int32).view(1, 6, 1),
    )
    query, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5]]).repeat(6, 1)
    means[4:] = torch.nan
    rule = RetrieveRule(k=2, relevant=4.0)
    found = RuleSelector(rule, 16).select(Asked(rows, 9.0, None, 0, query, means[None]))
    assert found.block_index[0].tolist() == [2, 3]


@pytest.mark.parametrize("scope", ["kv_head", "query_head"])
def test_each_head_has_its_own_relevant_blocks(scope):
    random = torch.Generator().manual_seed(5)
    heads, blocks = (2 if scope == "kv_head" else 4), 30
    query = torch.randn(3, 4, 8, generator=random)
    keys = torch.randn(1, blocks, 2, 8, generator=random)
    spans = tuple(Span(float(n), n + 0.75) for n in range(blocks))
    rows = Rows(spans, (36,) * blocks, torch.arange(blocks, dtype=torch.int32).view(1, blocks, 1))
    rule = RetrieveRule(
        summary="mean_key", layers="each", scope=scope, score="dot", k=4, relevant=2.0
    )
    found = RuleSelector(rule, 16).select(Asked(rows, 40.0, None, 0, query, keys))
    assert found.block_index.shape == (1, heads, 4) and found.scores.shape == (1, heads, blocks)
    for head, scores in enumerate(found.scores[0]):
        ranks = selection._newest_relevant(scores, 2.0)
        assert found.block_index[0, head].tolist() == ranks.topk(4).indices.sort().values.tolist()


@pytest.mark.parametrize("relevant", [None, 2.0])
@pytest.mark.parametrize("scope", ["stream", "kv_head"])
def test_a_rule_lists_the_pages_of_what_it_chooses(scope, relevant):
    random = torch.Generator().manual_seed(6)
    blocks = 30
    spans = tuple(Span(float(n), n + 0.75) for n in range(blocks))
    pages = torch.randperm(90, generator=random).int().view(1, blocks, 3)
    rows = Rows(spans, (36,) * blocks, pages)
    asked = Asked(
        rows, 40.0, 0, 0, torch.randn(3, 4, 8, generator=random),
        torch.randn(1, blocks, 2, 8, generator=random),
    )  # fmt: skip
    rule = RetrieveRule(
        summary="mean_key", layers="each", scope=scope, score="dot", k=4, relevant=relevant
    )
    sinks = torch.tensor([[95, 91]], dtype=torch.int32)
    recent = torch.tensor([[int(pages[0, 3, 0]), 99]], dtype=torch.int32)
    table, found = RuleSelector(rule, 16).select_pages(asked, sinks, recent)
    alone = RuleSelector(rule, 16).select(asked)
    for got, wanted in zip(vars(found).values(), vars(alone).values()):
        assert torch.equal(got, wanted)
    assert torch.equal(table, select_pages(found.block_index, pages, sinks, recent))


def test_a_rule_that_selects_in_its_own_way_is_asked_for_rows(monkeypatch):
    class First(RuleSelector):
        def select(self, asked):
            return chosen_rows([0], asked.rows)

    with small_engine(prune__threshold=0.9, retrieve__k=2) as made, made.open() as stream:
        stream.ingest(pictures(40))
        first = stream.history.chunks()[0]
        _, figures = answer_of(stream, First(made.method.retrieve, 16))
        assert figures.blocks == [(first.start_s, first.end_s)]


def test_how_relevant_is_a_number_and_not_with_mass_or_groups():
    for wrong in (-0.1, inf, nan):
        with pytest.raises(ValueError, match="relevant"):
            RetrieveRule(relevant=wrong)
    with pytest.raises(ValueError, match="exclude each other"):
        RetrieveRule(k=None, mass=0.5, relevant=4.0)
    with pytest.raises(ValueError, match="set group=1"):
        RetrieveRule(k=4, group=2, relevant=4.0)
