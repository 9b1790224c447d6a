"""The selector protocol: what a question reads is what its selector says, whoever that is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.models import Qwen2_5_VLRunner
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.selection import Asked, chosen_rows


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
