"""Ctrl-C while a stream waits for its stages, or anywhere else in a call that takes frames in."""

from __future__ import annotations

import linecache
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.pipeline import belt as belt_module
from vicostream_kernels.pipeline import session, stages
from vicostream_kernels.pipeline.errors import PipelineError

WAIT_S = 20
CHUNK = 8
FRAMES = 56


def frames(count=FRAMES):
    return torch.from_numpy(pictures(count)).clone()


@pytest.fixture(scope="module")
def expected():
    """What a serial stream says and keeps."""
    with small_engine() as made, made.open(fps=2) as stream:
        return course(stream, 0)


def course(stream, at):
    """The frames from ``at`` on, a flush and a question; what came of all."""
    stream.ingest(frames()[at:])
    stream.flush()
    said = "".join(stream.ask("What?", max_new_tokens=4))
    kept = [stream.history.cache.contents(block).clone() for block in stream.history.chunks()]
    return said, kept, stream.recorder.frames_processed


@pytest.fixture
def held(monkeypatch):
    """The last stage stands still until this is set."""
    gate, run = threading.Event(), session.Prefill.run

    def waiting(self, chunk):
        assert gate.wait(WAIT_S)
        return run(self, chunk)

    monkeypatch.setattr(session.Prefill, "run", waiting)
    yield gate
    gate.set()


def interrupted(stream, call):
    """Makes a call that waits for the stages, and interrupts that wait."""
    changed, caller = stream._way._changed, threading.current_thread()
    wait = changed.wait

    def interrupting(timeout=None):
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        return wait(timeout)

    changed.wait = interrupting
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        del changed.wait


@pytest.mark.parametrize("call", ["ask", "flush", "save"])
def test_a_call_that_waits_may_be_interrupted_and_the_stream_goes_on(
    call, held, expected, tmp_path
):
    calls = {
        "ask": lambda stream: stream.ask("What?"),
        "flush": lambda stream: stream.flush(),
        "save": lambda stream: stream.save(tmp_path / "session"),
    }
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        stream.ingest(frames()[: 2 * CHUNK])
        interrupted(stream, lambda: calls[call](stream))
        assert not stream.recorder.questions and not list(tmp_path.iterdir())
        held.set()
        calls[call](stream)
        said, kept, processed = course(stream, 2 * CHUNK)
    assert (said, processed) == (expected[0], expected[2])
    assert all(map(torch.equal, kept, expected[1]))


def test_an_ingest_that_waits_for_room_says_which_frames_it_took(held, expected):
    """They wait in the stream, and go in once; the caller goes on with the others."""
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        mine = frames(112)
        interrupted(stream, lambda: stream.ingest(mine))
        mine.fill_(7)
        taken = stream.recorder.frames_ingested
        assert CHUNK < taken < 112 and taken % CHUNK == 0
        interrupted(stream, stream.flush)  # nothing is lost by a second one
        held.set()
        rest = frames(112)[taken:]
        assert stream.ingest(rest) + stream.flush() == 112 // CHUNK
        assert stream.recorder.frames_processed == 112
        kept = [stream.history.cache.contents(block).clone() for block in stream.history.chunks()]
    assert all(map(torch.equal, kept, expected[1])) and len(kept) == 112 // CHUNK


class Interrupts:
    """Raises KeyboardInterrupt before the ``at``-th line of the session or the belt, in the thread
    that enters it. Not before a ``with``: a trace sees it again as it is left, where a true
    interrupt does not come between the body and what the lock does."""

    files = (session.__file__, belt_module.__file__)

    def __init__(self, at):
        self._left, self.came = at, False

    def _seen(self, frame, event, _):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self._left -= 1
            if self._left == 0:
                self.came = True
                raise KeyboardInterrupt
        return self._seen

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(lambda f, *_: self._seen if f.f_code.co_filename in self.files else None)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)


@pytest.mark.parametrize("overlap", [True, False])
def test_wherever_an_interrupt_comes_no_frame_is_lost_or_doubled_unseen(overlap, monkeypatch):
    """Either the stream goes on with what it says it has not taken, or it says that it failed."""
    seen = []

    def last(self, chunk):
        seen.extend(chunk.images[:, 0, 0, 0].tolist())
        return SimpleNamespace(block=SimpleNamespace(pages=[]), seen=0, kept=0)

    for stage in (session.Preprocess, session.Encode):
        monkeypatch.setattr(stage, "run", lambda self, value: value)
    monkeypatch.setattr(
        session.Prune,
        "run",
        lambda self, value: SimpleNamespace(images=value.images, count=stages.HostCount(0)),
    )
    monkeypatch.setattr(session.Prefill, "run", last)
    monkeypatch.setattr(session.Prefill, "begin", lambda self, ids: None)
    video = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 32, 32, 3)
    went_on, failed, at = 0, 0, 0
    with small_engine(engine__overlap=overlap, engine__frames_per_chunk=2) as made:
        while True:
            at += 1 if overlap else 3  # in turn most lines are a stage's, and the end
            seen.clear()
            with made.open() as stream:
                mine = video.clone()
                with Interrupts(at) as interrupts:
                    try:
                        stream.ingest(mine[:1])
                        stream.ingest(mine[1 : 5 if overlap else 3])
                    except KeyboardInterrupt:
                        pass
                mine.fill_(99)
                try:
                    stream.ingest(video[stream.recorder.frames_ingested :])
                    stream.flush()
                except PipelineError as error:
                    assert "failed before" in str(error)
                    failed += 1
                else:
                    assert seen == list(range(7)), at
                    went_on += 1
            if not interrupts.came:
                break
    assert went_on > 20 and failed
