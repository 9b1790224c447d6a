"""Open answers and the video that goes on: neither may change the other."""

from __future__ import annotations

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.cache import OutOfPages


class Recorded:
    """Takes the likeliest token and keeps the logits."""

    def __init__(self) -> None:
        self.logits = []

    def next_token(self, seen, logits):
        self.logits.append(logits.clone())
        return int(logits.argmax())


def logits_of(stream, time_s=None, meanwhile=lambda stream: None, tokens=6):
    """Those of an answer, and the spans of what it read; ``meanwhile`` comes after its first."""
    sampler = Recorded()
    with stream.ask("What?", time_s, sampler=sampler, max_new_tokens=tokens) as answer:
        next(answer)
        meanwhile(stream)
        "".join(answer)
    return torch.stack(sampler.logits), answer.figures.blocks


@pytest.mark.parametrize(
    ("time_s", "meanwhile"),
    (
        (None, lambda stream: stream.flush()),
        (99.0, lambda stream: stream.ingest(pictures(16))),
        (None, lambda stream: stream.ingest(pictures(4), [stream.time_s] * 4)),
    ),
    ids=("what waited", "before the time asked for", "at the same time"),
)
def test_an_open_answer_never_sees_what_was_written_after_it(time_s, meanwhile):
    """Its window slides on over the chunks that it could see at first."""

    def told(then):
        with small_engine("streaming-llm") as engine, engine.open(fps=10) as stream:
            stream.ingest(pictures(28))  # three chunks, four frames wait
            return logits_of(stream, time_s, then)

    alone, beside = told(lambda stream: None), told(meanwhile)
    assert torch.equal(alone[0], beside[0]) and alone[1] == beside[1]


def test_a_question_whose_pages_push_chunks_out_sees_the_others():
    changes = {"retrieve": "none", "engine__window_chunks": 1, "engine__page_size": 16}
    with small_engine(engine__max_pages=40, **changes) as engine, engine.open() as stream:
        stream.ingest(pictures(240))
        before = stream.history.chunks()
        answer = stream.ask("What happened at the table? " * 9)
        seen = answer.figures.blocks
        assert "".join(answer) and seen == [(b.start_s, b.end_s) for b in before[-len(seen) :]]
        assert 0 < len(seen) < len(before)


def test_what_an_open_answer_holds_is_not_there_for_later_questions():
    def told(closed):
        changes = {"attention__window": 100}
        with small_engine("streaming-llm", **changes) as engine, engine.open(fps=10) as stream:
            stream.ingest(pictures(32))
            first = stream.ask("What?", max_new_tokens=4)
            next(first)
            if closed:
                first.close()
            for _ in range(4):
                stream.ingest(pictures(40))
            return logits_of(stream, 2.5, tokens=3)

    one, other = told(closed=True), told(closed=False)
    assert torch.equal(one[0], other[0]) and one[1] == other[1] == []


@pytest.mark.parametrize("overlap", [False, True])
def test_a_chunk_waits_while_answers_hold_what_would_have_to_go(overlap):
    """Nothing is lost and nothing is written twice: the chunk is tried again when they are done."""
    changes = {"engine__window_chunks": 2, "retrieve__k": 8, "engine__overlap": overlap}
    with small_engine("vicostream", engine__max_pages=44, **changes) as engine:
        stream, ends = engine.open(fps=10), []
        for at in range(8):
            stream.ingest(pictures(8, start=8 * at))
        stream.flush()
        answers = [stream.ask("What?", (at + 1) * 0.8) for at in range(8)]
        with pytest.raises(OutOfPages, match="in chunks pinned or held"):
            for at in range(8, 40):
                stream.ingest(pictures(8, start=8 * at))
                stream.flush()
        taken = stream.recorder.frames_ingested
        assert taken == 8 * (at + 1)
        for answer in answers:
            answer.close()
        stream.flush()
        ends = [chunk["end_s"] for chunk in stream.report()["chunks"]]
        assert len(ends) == len(set(ends)) == at + 1 and "".join(stream.ask("What?")) is not None
        stream.ingest(pictures(8))
        stream.close()
        assert engine.cache.used_pages == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "preset, changes",
    [
        ("vicostream", {"retrieve": "none", "engine__window_chunks": 2, "engine__max_pages": 16}),
        ("streaming-llm", {"attention__window": 90, "engine__max_pages": 20}),
    ],
)
def test_while_a_chunk_waits_for_room_questions_see_the_whole_window(preset, changes, overlap):
    """What only that chunk would not see any more is still there for them."""
    changes = {**changes, "engine__history": "window", "engine__overlap": overlap}
    with small_engine(preset, **changes) as made, made.open(fps=2) as stream:
        held, frames = [], pictures(40)

        def told():
            with stream.ask("What?", max_new_tokens=3) as answer:
                return "".join(answer), answer.figures.blocks, stream.report()["forgotten"]

        for at in (*range(0, 40, 8), 0, 8):
            expected = told()
            if at == 32 or stream.time_s > 19:
                held.append(stream.ask("What did you see?", max_new_tokens=50))
            try:
                stream.ingest(frames[at : at + 8])
                stream.flush()
            except OutOfPages:
                break
        else:
            pytest.fail("there was room")
        assert told() == expected
        for answer in held:
            answer.close()
        assert stream.flush() == 1
        assert told()[1][-1][0] == expected[1][-1][0] + 4
