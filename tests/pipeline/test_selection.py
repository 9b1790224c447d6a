"""The selector protocol: what a question reads is what its selector says, whoever that is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.methods import RetrieveRule
from vicostream_kernels.models import Qwen2_5_VLRunner
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


@pytest.mark.parametrize("k, force_last", [(3, 0), (4, 1)])
def test_of_blocks_that_are_alike_the_newer_are_read(k, force_last):
    random = torch.Generator().manual_seed(3)
    blocks = tuple(Span(2.0 * n, 2.0 * n + 1.75) for n in range(40))
    rows = Rows(blocks, (36,) * 40, torch.arange(40, dtype=torch.int32).view(1, 40, 1))
    query, means = (torch.randn(n, 8, generator=random) for n in (1, 40))
    for best in (2, 17, 31):  # alike to the last bit, and nearest to the question
        means[best] = 3 * query[0]
    cosines = torch.cosine_similarity(means.double(), query.double())

    def read(**settings):
        rule = RetrieveRule(**{"k": k, "force_last": force_last, **settings})
        asked = Asked(rows, 70.0, None, 0, query, means[None])
        return [n for n in RuleSelector(rule, 16).select(asked).block_index[0].tolist() if n >= 0]

    for recency, recency_s in ((0.1, 60.0), (0.7, 5.0), (2.0, 400.0)):
        age = torch.tensor([max(0.0, 70.0 - b.end_s) for b in blocks], dtype=torch.float64)
        score = cosines - recency * age / (age + recency_s)
        score[40 - force_last :] = torch.inf
        expected = score.topk(k).indices.sort().values.tolist()
        assert read(recency=recency, recency_s=recency_s) == expected
        assert read(recency=recency, recency_s=recency_s, k=None, token_budget=36 * k) == expected
    assert 2 in read() and 2 not in read(recency=2.0), "old ones give way"
    assert 2 in read(recency=0.05, recency_s=0.1), "but never lose more than recency"


def test_recency_needs_a_score_whose_size_is_known():
    for wrong in ({"recency": -0.1}, {"recency": 0.1, "recency_s": 0.0}, {"recency": torch.nan}):
        with pytest.raises(ValueError, match="recency"):
            RetrieveRule(**wrong)
    with pytest.raises(ValueError, match="recency=0.1 needs score='cosine', got 'dot'"):
        RetrieveRule(recency=0.1, score="dot")
