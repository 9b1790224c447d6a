"""Oracle, chance and erasing: they read and drop exactly what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pipeline_kit import pictures, small_engine, tiny_runner

from vicostream_kernels import methods
from vicostream_kernels.evaluation._world import PLACES
from vicostream_kernels.evaluation.hooks import (
    Chance,
    Missing,
    Oracle,
    RandomScore,
    drop_at_random,
    evidence_tokens,
    selector,
    without_tokens,
)
from vicostream_kernels.evaluation.streamqa import make_clip
from vicostream_kernels.methods import ScoredChunk
from vicostream_kernels.pipeline.engine import StreamEngine


def asked(count):
    """Candidates of two seconds each, as a selector sees them."""
    blocks = tuple(SimpleNamespace(start_s=2.0 * n, end_s=2.0 * n + 1.75) for n in range(count))

    class Rows:
        pages = torch.zeros(1, count, 1, dtype=torch.int32)

        def __len__(self):
            return count

    rows = Rows()
    rows.blocks = blocks
    return SimpleNamespace(rows=rows, time_s=2.0 * count)


def read(chooser, count=10):
    return chooser.select(asked(count)).block_index[0].tolist()


def test_the_oracle_reads_the_evidence_and_the_newest():
    spans = ((3.0, 4.5), (9.0, 9.0))  # in the chunks 1, 2 and 4
    assert read(Oracle(spans, k=4)) == [1, 2, 4]
    assert read(Oracle(spans, k=4, last=1)) == [1, 2, 4, 9]
    assert read(Oracle(spans, k=2)) == [2, 4]
    assert read(Oracle(spans, k=3, last=1)) == [2, 4, 9]
    assert read(Oracle((), k=3)) == []


def test_chance_reads_k_and_always_the_same():
    first = read(Chance(seed=3, k=4, last=1))
    assert first == read(Chance(seed=3, k=4, last=1)) and len(first) == 4 and 9 in first
    assert len({tuple(read(Chance(seed=s, k=4))) for s in range(20)}) > 10
    assert read(Chance(seed=0, k=4), count=2) == [0, 1]


def test_missing_reads_all_but_the_evidence():
    assert read(Missing(((3.0, 4.5),)), count=5) == [0, 3, 4]


def test_selectors_by_name():
    rule, question = methods.get("live").retrieve, SimpleNamespace(evidence=((0.0, 1.0),))
    assert selector("rule", rule, question, 0) is None
    assert selector("oracle", rule, question, 0) == Oracle(question.evidence, rule.k, 1)
    assert selector("random", rule, question, 7) == Chance(7, rule.k, 1)
    assert selector("missing", rule, question, 7) == Missing(question.evidence)
    with pytest.raises(ValueError, match="one of rule, oracle, random, missing"):
        selector("best", rule, question, 0)
    with pytest.raises(ValueError, match="needs a method with retrieve.k"):
        selector("oracle", None, question, 0)


def test_evidence_tokens_show_the_shape_while_it_was_there():
    clip = make_clip(3, 48, kinds=("past", "motion"), frames=False)
    question = next(q for q in clip.questions if q.form == "last_place" and q.evidence)
    tokens = evidence_tokens(clip, question)
    (span,) = question.evidence
    assert {step for step, _ in tokens} == set(range(int(2 * span[0]), int(2 * span[1]) + 1))
    assert {PLACES[cell] for _, cell in tokens} == {question.answer}


def test_scores_by_chance_are_new_for_each_chunk_and_the_same_in_every_run():
    chunk = ScoredChunk(torch.zeros(4, 9, 2), (4, 3, 3))

    def scores():
        state = {}
        return [RandomScore()(chunk, state).score for _ in range(2)]

    first, again = scores(), scores()
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(*first)


@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_dropping_at_random_keeps_the_share(keep):
    with small_engine("full-history") as plain:
        engine = StreamEngine(tiny_runner(), drop_at_random(plain.method, keep))
    with engine, engine.open() as stream:
        stream.ingest(pictures(16))
        recorder = stream.recorder
    assert recorder.tokens_kept == int(recorder.tokens_seen / 2 * keep) * 2


def test_erasing_takes_exactly_these_tokens_out():
    with small_engine("full-history") as plain:
        method = without_tokens(plain.method, frozenset({(0, 1), (5, 0), (99, 0)}))
    masks = []
    with StreamEngine(tiny_runner(), method) as engine:
        with engine.open(on_pruned=lambda mask: masks.append(mask.kept().reshape(4, -1))) as stream:
            stream.ingest(pictures(16))
    gone = [(4 * n + t, i) for n, m in enumerate(masks) for t, i in (~torch.tensor(m)).nonzero()]
    assert [(int(t), int(i)) for t, i in gone] == [(0, 1), (5, 0)]
