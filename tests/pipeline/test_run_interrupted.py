"""A run that ends early: interrupts, signals, sources and stages that fail, and what is kept."""

from __future__ import annotations

import io
import json
import signal

import pytest
from run_kit import Outcome

from vicostream_kernels.pipeline import run as run_module
from vicostream_kernels.pipeline.belt import Belt
from vicostream_kernels.pipeline.errors import PipelineError
from vicostream_kernels.pipeline.failures import INTERRUPTED
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.session import Encode, Stream
from vicostream_kernels.pipeline.stopping import heard

pytestmark = pytest.mark.usefixtures("loads_at_once")


def test_an_interrupt_waits_for_the_report_to_be_whole(tmp_path, video, monkeypatch):
    write = run_module.Recorder.write

    def interrupted(self, folder):
        signal.raise_signal(signal.SIGINT)
        return write(self, folder)

    monkeypatch.setattr(run_module.Recorder, "write", interrupted)
    options = RunOptions("missing.mp4", report=str(tmp_path))
    assert run(options, Screen(io.StringIO(), io.StringIO())) == INTERRUPTED
    assert json.loads((tmp_path / "report.json").read_text())["errors"]


def test_an_interrupt_writes_the_report(tmp_path, video, monkeypatch):
    ingest = Stream.ingest

    def interrupted(self, frames, times_s=None):
        if self.time_s > 1:
            raise KeyboardInterrupt
        return ingest(self, frames, times_s)

    monkeypatch.setattr(Stream, "ingest", interrupted)
    outcome = Outcome(tmp_path, video, "end What?")
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert outcome.report["frames"]["processed"] == 16

    frames = run_module.VideoSource.__iter__

    def damaged(self):
        self._note("decode", "damaged data skipped")
        yield from frames(self)

    monkeypatch.setattr(run_module.VideoSource, "__iter__", damaged)
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 130 and "damaged data skipped (at 0.000 s)" in outcome.lines[0]
    assert [error["where"] for error in outcome.report["errors"]] == ["decode", "ingest"]


@pytest.fixture
def signalled(monkeypatch):
    """Ctrl-C, so many times, while the chunk that begins at 0.8 s is in work."""
    count, encode = [1], Encode.run

    def interrupted(self, chunk):
        if chunk.source.start_s == 0.8:
            for _ in range(count[0]):
                signal.raise_signal(signal.SIGINT)
        return encode(self, chunk)

    monkeypatch.setattr(Encode, "run", interrupted)
    return count


def test_an_interrupt_lets_the_chunk_be_done_and_saves(tmp_path, video, signalled):
    path, before = tmp_path / "session", signal.getsignal(signal.SIGINT)
    outcome = Outcome(tmp_path, video, "end What?", save=str(path))
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert "the chunk in work is done first" in outcome.err and "saved the session" in outcome.err
    assert outcome.report["frames"]["processed"] == 16
    assert "frames    16 read, 16 processed" in outcome.out  # the figures are shown all the same
    assert signal.getsignal(signal.SIGINT) is before
    signalled[0] = 0
    again = Outcome(tmp_path, video, "end What?", restore=str(path))
    assert again.code == 0 and again.report["frames"]["processed"] == 16 + 40


def test_a_second_interrupt_leaves_at_once(tmp_path, video, signalled):
    signalled[0] = 2
    path = tmp_path / "session"
    outcome = Outcome(
        tmp_path, video, "end What?", save=str(path), show_pruning=str(tmp_path / "shown")
    )
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert not path.exists() and not list((tmp_path / "shown").iterdir())
    assert outcome.report["frames"]["processed"] == 8
    assert sorted(p.name for p in outcome.folder.iterdir()) == ["report.json", "trace.json"]


def test_without_a_session_to_save_an_interrupt_waits_for_nothing(tmp_path, video, signalled):
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 130 and outcome.report["frames"]["processed"] == 8


def test_an_interrupt_in_the_midst_of_an_answer_saves(tmp_path, video, monkeypatch):
    piece = Screen.piece

    def interrupted(self, text):
        signal.raise_signal(signal.SIGINT)
        piece(self, text)

    monkeypatch.setattr(Screen, "piece", interrupted)
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, "1 What?", save=str(path))
    assert outcome.code == 130 and path.exists() and len(outcome.lines) == 1


@pytest.mark.parametrize("live", [{}, {"realtime": True}], ids=["in turn", "in its thread"])
def test_a_source_that_fails_leaves_a_session(tmp_path, video, monkeypatch, live):
    frames = run_module.VideoSource.__iter__

    def ending(self):
        for _, frame in zip(range(20), frames(self)):
            yield frame
        raise PipelineError("the network is gone")

    monkeypatch.setattr(run_module.VideoSource, "__iter__", ending)
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, save=str(path), **live)
    assert outcome.code == 1 and outcome.lines == ["vicostream: error: the network is gone"]
    assert path.exists() and outcome.report["errors"][0]["where"] == "video"
    assert outcome.report["frames"]["read"] == 20
    # The four of the chunk that was not full are in the session.
    again = Outcome(tmp_path, video, restore=str(path)).report["frames"]
    assert again["read"] == again["processed"] == 40

    def full(*_):
        raise PipelineError("the session cannot be saved: No space left on device")

    monkeypatch.setattr(Stream, "save", full)
    outcome = Outcome(tmp_path, video, save=str(tmp_path / "other"))
    assert outcome.code == 1
    assert [error["where"] for error in outcome.report["errors"]] == ["save", "video"]


# -- stages that fail beside each other ---------------------------------------------------------


def said(outcome):
    return [(error["where"], error["what"], error["time_s"]) for error in outcome.report["errors"]]


OVERLAP = ["engine.overlap=true"]
BROKEN = ("ingest", "Broken: no such kernel")


@pytest.mark.parametrize(
    ("leaves", "code", "first"),
    [
        (KeyboardInterrupt(), 130, ("video", "interrupted")),
        (PipelineError("the network is gone"), 1, ("video", "the network is gone")),
    ],
    ids=["interrupt", "source"],
)
def test_a_run_that_ends_reports_it_beside_what_ended_it(
    broken_encoder, tmp_path, video, monkeypatch, leaves, code, first
):  # fmt: skip
    broken_encoder.at = 0.8
    frames, ingest = run_module.VideoSource.__iter__, Stream.ingest

    def ingested(self, *arguments):
        done = ingest(self, *arguments)
        if self.time_s > 0.8:
            broken_encoder.has_failed(self)
        return done

    def ending(self):
        for frame in frames(self):
            if frame.time_s > 1.59:
                raise leaves
            yield frame

    monkeypatch.setattr(Stream, "ingest", ingested)
    monkeypatch.setattr(run_module.VideoSource, "__iter__", ending)
    outcome = Outcome(tmp_path, video, "end Late?", settings=OVERLAP)
    assert outcome.code == code
    assert said(outcome) == [
        (*first, 1.5), (*BROKEN, 0.8), ("answer", "not asked: Late?", None)
    ]  # fmt: skip


def test_an_error_has_the_time_of_its_chunk(broken_encoder, tmp_path, video, monkeypatch):
    broken_encoder.at = 0.8
    broken_encoder.may.clear()
    ingest = Stream.ingest

    def later(self, frames, times):
        if times[0] > 2:
            broken_encoder.may.set()
        return ingest(self, frames, times)

    monkeypatch.setattr(Stream, "ingest", later)
    outcome = Outcome(tmp_path, video, settings=OVERLAP)
    assert outcome.code == 1 and said(outcome) == [(*BROKEN, 0.8)]


def test_in_turn_an_error_has_the_time_of_its_chunk_too(broken_encoder, tmp_path, video):
    """A question cuts the batch: the chunk began before it."""
    broken_encoder.at = 0.8
    outcome = Outcome(tmp_path, video, "1.2 What?")
    assert outcome.code == 1
    assert said(outcome) == [(*BROKEN, 0.8), ("answer", "not asked: What?", 1.2)]


def test_a_question_that_hears_of_it_was_not_asked(broken_encoder, tmp_path, video, monkeypatch):
    broken_encoder.may.clear()
    flush = Stream.flush

    def hearing(self):
        broken_encoder.may.set()
        return flush(self)

    monkeypatch.setattr(Stream, "flush", hearing)
    outcome = Outcome(tmp_path, video, "1.5 Early?", "end Late?", settings=OVERLAP)
    assert outcome.code == 1 and said(outcome) == [
        (*BROKEN, 0.0),
        ("answer", "not asked: Early?", 1.5),
        ("answer", "not asked: Late?", None),
    ]
    assert outcome.report["questions"] == []


def test_a_save_that_hears_of_it_saves_nothing(broken_encoder, tmp_path, video):
    broken_encoder.at = 3.2
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, settings=OVERLAP, save=str(path))
    assert outcome.code == 1 and said(outcome) == [(*BROKEN, 3.2)] and not path.exists()


def test_an_interrupt_while_a_question_waits_for_its_chunks(tmp_path, video, monkeypatch):
    settle = Belt.settle

    def interrupted(self):
        settle(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Belt, "settle", interrupted)
    outcome = Outcome(tmp_path, video, "1.5 Early?", settings=OVERLAP)
    assert outcome.code == 130 and outcome.report["questions"] == []
    assert said(outcome) == [
        ("answer", "interrupted", 1.5), ("answer", "not asked: Early?", 1.5)
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_ends_a_run_unless_that_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with heard():
            if ignored:
                signal.raise_signal(signal.SIGHUP)
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
