"""``engine.overlap``: the bits of a serial run, whatever comes between the chunks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from weakref import ref

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.cache import DiskFull
from vicostream_kernels.models.reuse import EncoderState
from vicostream_kernels.pipeline import engine, session
from vicostream_kernels.pipeline.errors import PipelineError
from vicostream_kernels.pipeline.lanes import Lane

PRESETS = (
    "live",
    "vicostream",
    "full-history",
    "streaming-llm",
    "vicostream+stc",
    "quest",
    "streamingtom",
)


def frames(count=88):
    return torch.from_numpy(pictures(count)).clone()


def contents(stream):
    return [stream.history.cache.contents(block).clone() for block in stream.history.chunks()]


def course(stream, video, part):
    """Frames in parts, questions between them, one answered while frames go on; what came of it."""
    said = []
    late = None
    for at in range(0, len(video), part):
        # What the caller hands in is overwritten after each call.
        mine = video[at : at + part].clone()
        stream.ingest(mine)
        mine.fill_(7)
        if at // part % 3 == 1:
            with stream.ask("What?", max_new_tokens=4) as answer:
                said.append(("".join(answer), answer.figures.blocks))
        if at // part == 4:
            late = stream.ask("And now?", max_new_tokens=6)
            said.append(next(late, ""))
        elif late is not None:
            said.append(next(late, ""))
    stream.flush()
    said += ["".join(late), late.figures.blocks]
    return said, contents(stream)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_bits_are_those_of_a_serial_run(preset):
    found = []
    for overlap in (False, True):
        with small_engine(preset, engine__overlap=overlap) as made, made.open(fps=2) as stream:
            said, kept = course(stream, frames(), 5)
            report = stream.report()
            spans = [[c["start_s"], c["end_s"], c["seen"], c["kept"]] for c in report["chunks"]]
            found.append((said, spans, report["tokens"], report["frames"], report["reuse"]))
            assert set(report["chunks"][0]["stages_ms"]) == {
                "preprocess", "encode", "prune", "prefill"
            }  # fmt: skip
        found[-1] += (kept,)
    assert found[0][:-1] == found[1][:-1]
    assert all(map(torch.equal, found[0][-1], found[1][-1])) and len(found[0][-1]) > 2


def test_a_session_goes_on_from_one_to_the_other(tmp_path):
    video, found = frames(), []
    for first, second in ((False, False), (True, False), (False, True), (True, True)):
        with small_engine("vicostream+stc", engine__overlap=first) as made:
            with made.open(fps=2) as stream:
                stream.ingest(video[:45])
                stream.save(tmp_path / "session")
        with small_engine("vicostream+stc", engine__overlap=second) as made:
            with made.restore(tmp_path / "session") as stream:
                found.append(course(stream, video[45:], 7))
    for said, kept in found[1:]:
        assert said == found[0][0] and all(map(torch.equal, kept, found[0][1]))


def test_streams_of_one_engine_share_its_turn():
    video, alone = frames(48), []
    for start in (0, 3):
        with small_engine() as made, made.open(fps=2) as stream:
            stream.ingest(video[start:])
            alone.append(("".join(stream.ask("What?", max_new_tokens=4)), contents(stream)))
    with small_engine(engine__overlap=True) as made:
        streams = [made.open(fps=2) for _ in alone]
        for at in range(0, 48, 6):
            for stream, start in zip(streams, (0, 3)):
                stream.ingest(video[start:][at : at + 6])
        for stream, (said, kept) in zip(streams, alone):
            assert "".join(stream.ask("What?", max_new_tokens=4)) == said
            assert all(map(torch.equal, contents(stream), kept))
        streams[0].close()


def test_ingest_does_not_wait_for_the_chunk(monkeypatch):
    gate = threading.Event()
    run = session.Prefill.run

    def held(self, chunk):
        assert gate.wait(20)
        return run(self, chunk)

    monkeypatch.setattr(session.Prefill, "run", held)
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        assert stream.ingest(frames(16)) == 0
        assert stream.recorder.frames_ingested == 16 and stream.recorder.frames_processed == 0
        gate.set()
        assert stream.flush() == 2 and stream.recorder.frames_processed == 16


def test_a_stage_that_fails_fails_the_stream_at_the_next_call(monkeypatch):
    def broken(self, chunk):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(session.Encode, "run", broken)
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        with pytest.raises(RuntimeError, match="no such kernel"):
            stream.ingest(frames(24))
            stream.flush()
        for call in (stream.flush, lambda: stream.ingest(frames(8)), lambda: stream.ask("What?")):
            with pytest.raises(PipelineError, match="failed before"):
                call()


def test_a_chunk_without_room_waits_and_questions_are_answered(monkeypatch):
    with small_engine(retrieve__k=4) as made, made.open(fps=2) as stream:
        stream.ingest(frames(40))
        expected = contents(stream)
    run, full = session.Prefill.run, [True]

    def no_room(self, chunk):
        if full and chunk.source.start_s > 0:
            raise DiskFull("full", [])
        return run(self, chunk)

    monkeypatch.setattr(session.Prefill, "run", no_room)
    with small_engine(retrieve__k=4, engine__overlap=True) as made, made.open(fps=2) as stream:
        stream.ingest(frames(8))
        stream.flush()
        stream.ingest(frames(40)[8:16])
        assert stream.ask("What?", max_new_tokens=2).figures.blocks == [(0.0, 3.5)]
        for _ in range(2):
            with pytest.raises(DiskFull):
                stream.flush()
        taken = stream.recorder.frames_ingested
        assert taken == 16 and stream.recorder.frames_processed == 8
        full.clear()
        stream.ingest(frames(40)[taken:])
        stream.flush()
        assert stream.recorder.frames_processed == 40
        assert all(map(torch.equal, contents(stream), expected))


@pytest.mark.parametrize("how", ["stream", "engine"])
def test_closing_ends_the_threads(how):
    before = set(threading.enumerate())
    made = small_engine(engine__overlap=True)
    stream = made.open(fps=2)
    stream.ingest(frames(24))
    (stream if how == "stream" else made).close()
    assert set(threading.enumerate()) == before
    stream.close()
    made.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_was_closed_goes_with_its_last_user(overlap):
    """What it holds of the encoder is large, and on a GPU nothing tells the garbage collector."""
    gc.disable()
    try:
        with small_engine("vicostream+stc", engine__overlap=overlap) as made:
            stream = made.open(fps=2)
            stream.ingest(frames(16))
            stream.close()
            gone, recorder = ref(stream), stream.recorder
            del stream
            assert gone() is None and recorder.report()["reuse"]["calls"] <= 2
    finally:
        gc.enable()


def test_an_engine_that_was_dropped_goes_and_its_threads_with_it():
    before = set(threading.enumerate())
    made = small_engine(engine__overlap=True)
    stream = made.open(fps=2)
    stream.ingest(frames(24))
    gone = ref(made), ref(stream)
    del made, stream
    until = time.monotonic() + 20
    while set(threading.enumerate()) != before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert set(threading.enumerate()) == before and [each() for each in gone] == [None, None]


def test_a_process_may_end_while_stages_are_at_work(tmp_path):
    script = """
from pipeline_kit import pictures, small_engine
stream = small_engine(engine__overlap=True).open(fps=2)
stream.ingest(pictures(200))
"""
    kit = str(Path(__file__).parent.parent)
    path = os.pathsep.join([kit, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_report_counts_whole_chunks(monkeypatch):
    refer_to = EncoderState.refer_to
    halfway, go_on = threading.Event(), threading.Event()

    def slow(self, *arguments):
        refer_to(self, *arguments)
        halfway.set()
        go_on.wait(0.2)

    monkeypatch.setattr(EncoderState, "refer_to", slow)
    with small_engine("vicostream+stc", engine__overlap=True) as made, made.open(fps=2) as stream:
        stream.ingest(frames(8))
        assert halfway.wait(20)
        layers = stream.report()["reuse"]["layers"]
        go_on.set()
        assert min(layer["reused"] for layer in layers) >= 0


def test_the_rate_is_that_of_the_stages_not_of_handing_over(monkeypatch):
    """Frames that come slowly: chunks are at work while the caller waits for the next ones."""
    run = session.Encode.run

    def slow(self, chunk):
        time.sleep(0.03)
        return run(self, chunk)

    monkeypatch.setattr(session.Encode, "run", slow)
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        for at in range(0, 40, 8):
            stream.ingest(frames(40)[at : at + 8])
            time.sleep(0.05)
        stream.flush()
        assert 5 * 0.03 <= stream.recorder.ingest_s <= stream.recorder.wall_s
        assert stream.report()["fps"]["ingest"] < 8 / 0.03


def test_what_outlives_a_call_is_made_on_the_lane_that_uses_it(tmp_path, monkeypatch):
    """On a GPU freed memory belongs to the stream that it was made on."""
    entered, made_on, order = [], {}, []

    class Noted(Lane):
        def __enter__(self):
            entered.append(self)
            order.append(("enters", self))

        def __exit__(self, *_):
            entered.pop()

        def follow(self):
            order.append(("follows", self))

    def noted(owner, name, what):
        inner = getattr(owner, name)

        def outer(*arguments, **keywords):
            made_on[what] = entered[-1] if entered else None
            return inner(*arguments, **keywords)

        monkeypatch.setattr(owner, name, outer)

    for module in (engine, session):
        monkeypatch.setattr(module, "Lane", Noted)
    noted(engine, "PagedKVCache", "cache")
    noted(session.Encode, "__init__", "encoder")
    noted(EncoderState, "load", "restored")
    noted(session, "save", "saving")
    with small_engine("vicostream+stc") as made:
        with made.open(fps=2) as stream:
            assert made_on == {"cache": made.turn._lane, "encoder": stream._lanes[1]}
            stream.ingest(frames(12))
            order.clear()
            stream.save(tmp_path / "session")
            # Frames that wait are the work of the caller's stream.
            assert order[0] == ("follows", made_on["saving"]) == ("follows", made.turn._lane)
        with made.restore(tmp_path / "session") as stream:
            assert made_on["restored"] is stream._lanes[1]


def test_the_count_is_there_before_the_turn_is_taken(monkeypatch):
    """On a GPU it comes late: an answer must not wait for it behind the last stage."""
    from vicostream_kernels.pipeline import stages

    counted, get = [], stages.HostCount.get

    def noted(self):
        counted.append(threading.current_thread().name)
        return get(self)

    monkeypatch.setattr(stages.HostCount, "get", noted)
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        stream.ingest(frames(8))
        stream.flush()
    assert counted == ["vicostream-2", "vicostream-3"]
