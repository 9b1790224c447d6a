"""A run beside the clock: typed questions, a file as a live video, late frames."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import pytest
from run_kit import Outcome

from vicostream_kernels.pipeline import feed as feed_module
from vicostream_kernels.pipeline import run as run_module
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.session import Encode, Stream

pytestmark = pytest.mark.usefixtures("loads_at_once")

WAIT_S = 20


@pytest.fixture
def keyboard(monkeypatch):
    """Where lines are typed, as standard input of the runs."""
    read, write = os.pipe()
    monkeypatch.setattr(feed_module, "TypedQuestions", partial(feed_module.TypedQuestions, read))

    class Keyboard:
        def types(self, text):
            os.write(write, text.encode() + b"\n")

        def leaves(self):
            os.close(self.ends.pop())

    Keyboard.ends = [read, write]
    yield Keyboard()
    for end in Keyboard.ends:
        os.close(end)


@pytest.fixture
def standing(monkeypatch):
    """A camera that stands still before its frame 20 until this is set."""
    gate, frames = threading.Event(), run_module.VideoSource.__iter__

    def camera(self):
        for frame in frames(self):
            if frame.index == 20:
                assert gate.wait(WAIT_S)
            yield frame

    monkeypatch.setattr(run_module.VideoSource, "__iter__", camera)
    yield gate
    gate.set()


def test_a_typed_question_is_asked_while_the_video_stands_still(
    tmp_path, video, keyboard, standing, monkeypatch
):
    answered = Screen.answered

    def then(self, figures):
        answered(self, figures)
        if figures.text == "And now?":
            keyboard.leaves()
        standing.set()

    monkeypatch.setattr(Screen, "answered", then)
    ingest = Stream.ingest

    def typing(self, frames, times_s):
        done = ingest(self, frames, times_s)
        if times_s[-1] == 1.5:
            keyboard.types("What is it?")
        if times_s[-1] == 3.9:
            keyboard.types("And now?")
        return done

    monkeypatch.setattr(Stream, "ingest", typing)
    outcome = Outcome(tmp_path, video, interactive=True)
    assert (outcome.code, outcome.lines) == (0, [])
    first, second = outcome.report["questions"]
    # All frames that were there, those of a chunk that was not full among them.
    assert first["text"] == "What is it?" and 1.5 <= first["blocks"][-1][1] <= 1.9
    assert second["text"] == "And now?" and second["time_s"] == 3.9
    assert all(q["waited_ms"] >= 0 and q["answer"] for q in (first, second))
    assert outcome.report["frames"] == {"read": 40, "processed": 40, "dropped": 0}
    assert "waited" in outcome.out and "Ctrl-D" in outcome.err
    assert outcome.report["live"]["interactive"] is True


def test_after_the_end_questions_are_taken_until_there_are_no_more(tmp_path, video, keyboard):
    keyboard.types("What?\n\nAnd then?")
    keyboard.leaves()
    outcome = Outcome(tmp_path, video, "end Known?", interactive=True, settings=["prune=none"])
    assert outcome.code == 0
    assert {q["text"] for q in outcome.report["questions"]} == {"What?", "And then?", "Known?"}
    known = next(q for q in outcome.report["questions"] if q["text"] == "Known?")
    assert known["waited_ms"] is None


def test_a_typed_question_that_cannot_be_asked_does_not_end_the_run(tmp_path, video, keyboard):
    keyboard.types("why " * 2000)
    keyboard.types("What?")
    keyboard.leaves()
    outcome = Outcome(tmp_path, video, interactive=True)
    assert outcome.code == 2 and "allowed: 1024" in outcome.lines[0]
    assert [q["text"] for q in outcome.report["questions"]] == ["What?"]
    assert outcome.report["frames"]["processed"] == 40


def test_what_was_typed_and_not_asked_is_told(tmp_path, video, keyboard, monkeypatch):
    def broken(self, chunk):
        keyboard.types("What?")
        keyboard.types("And?")
        time.sleep(0.3)  # until they were read
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Encode, "run", broken)
    outcome = Outcome(tmp_path, video, interactive=True)
    assert outcome.code == 1
    assert [error["what"] for error in outcome.report["errors"]] == [
        "RuntimeError: no such kernel", "not asked: What?", "not asked: And?"
    ]  # fmt: skip


def test_the_video_goes_on_while_an_answer_is_said(tmp_path, video, monkeypatch):
    chunks, piece = [], Screen.piece
    ingest = Stream.ingest

    def counting(self, frames, times_s):
        chunks.append(times_s[0])
        return ingest(self, frames, times_s)

    during = []

    def said(self, text):
        during.append(len(chunks))
        time.sleep(0.1)
        piece(self, text)

    monkeypatch.setattr(Stream, "ingest", counting)
    monkeypatch.setattr(Screen, "piece", said)
    outcome = Outcome(tmp_path, video, "0.7 What?", "3.2 And?", max_lag=99.0)
    beside = Outcome(tmp_path, video, "0.7 What?", "3.2 And?")
    assert outcome.code == beside.code == 0 and len(during) > 4
    assert during[2] > during[0], "no chunk was taken in between two pieces"
    for mine, other in zip(outcome.report["questions"], beside.report["questions"], strict=True):
        assert (mine["answer"], mine["blocks"]) == (other["answer"], other["blocks"])
    spans = [(c["start_s"], c["end_s"]) for c in outcome.report["chunks"]]
    assert spans == [(c["start_s"], c["end_s"]) for c in beside.report["chunks"]]


def test_a_stage_that_fails_during_an_answer_ends_the_run(
    broken_encoder, tmp_path, video, monkeypatch
):
    broken_encoder.at = 0.8
    monkeypatch.setattr(Screen, "piece", lambda self, text: time.sleep(0.1))
    outcome = Outcome(tmp_path, video, "0.7 What?", "end Late?", max_lag=99.0)
    assert outcome.code == 1
    assert [(e["where"], e["what"]) for e in outcome.report["errors"]] == [
        ("ingest", "Broken: no such kernel"), ("answer", "not asked: Late?")
    ]  # fmt: skip


def test_a_file_in_real_time(tmp_path, video):
    began = time.monotonic()
    outcome = Outcome(tmp_path, video, "1.5 What?", realtime=True)
    assert outcome.code == 0 and time.monotonic() - began > 3.9
    report = outcome.report
    live = report["live"]
    assert (live["realtime"], live["late"], live["max_lag_s"]) == (True, 0, None)
    assert 0 <= live["lag_s"]["p50"] <= live["lag_s"]["max"] < 3.9
    # Waiting is no work: the rate is what the stages could take.
    assert report["fps"]["ingest"] > 15 and report["stages_ms"]["decode"]["p99"] < 1000
    assert "lag " in outcome.out and "decode beside it" in outcome.out
    assert Outcome(tmp_path, video).report["live"] is None


def test_a_file_is_never_late_unless_it_is_played(tmp_path, video, monkeypatch):
    """It is read as fast as it goes, two chunks ahead of what is worked on."""
    run = Encode.run

    def slow(self, chunk):
        time.sleep(0.1)
        return run(self, chunk)

    monkeypatch.setattr(Encode, "run", slow)
    outcome = Outcome(tmp_path, video, max_lag=0.2)
    assert outcome.code == 0 and "--max-lag does nothing" in outcome.err
    assert outcome.report["frames"]["dropped"] == 0
    assert outcome.report["live"]["lag_s"] is None and "lag " not in outcome.out


def test_late_frames_are_left_out(tmp_path, video, monkeypatch):
    run = Encode.run

    def slow(self, chunk):
        time.sleep(1.0)  # for at most 0.8 s of video
        return run(self, chunk)

    monkeypatch.setattr(Encode, "run", slow)
    outcome = Outcome(tmp_path, video, realtime=True, max_lag=0.5)
    assert outcome.code == 0
    report = outcome.report
    late, frames = report["live"]["late"], report["frames"]
    assert late > 0 and frames == {"read": 40, "processed": 40 - late, "dropped": late}
    assert report["live"]["lag_s"]["max"] <= 0.5
    assert f"{late} left out as too late" in outcome.out


def test_no_thread_is_left_where_the_run_ends_before_it_has_begun(tmp_path, video, monkeypatch):
    """FFmpeg would crash in one that reads on when the file is closed."""

    def interrupted(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "start", interrupted)
    outcome = Outcome(tmp_path, video, interactive=True, realtime=True)
    assert outcome.code == 130
    assert not [t for t in threading.enumerate() if t.name.startswith("vicostream")]


def test_an_interrupt_while_the_source_is_closed_leaves_at_once(tmp_path, video, monkeypatch):
    close = feed_module.Arrivals.close

    def interrupted(self, *_):
        close(self)
        raise KeyboardInterrupt

    def stopped(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(feed_module.Arrivals, "close", interrupted)
    monkeypatch.setattr(Screen, "piece", stopped)
    outcome = Outcome(tmp_path, video, "1.5 What?", max_lag=99.0)
    assert outcome.code == 130 and outcome.report["chunks"]
    assert sorted(p.name for p in outcome.folder.iterdir()) == ["report.json", "trace.json"]


def test_a_last_line_that_comes_as_one_looks_is_no_end():
    class Ending:
        ended, lines = False, 0

        def __bool__(self):
            there, self.lines, self.ended = self.lines, 1, True
            return bool(there)

    feed = feed_module.Feed([], [], None, bool, chunk=8)
    feed._typed = Ending()
    assert feed.listens
