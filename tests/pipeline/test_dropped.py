"""Answers and streams that are dropped, not closed, wherever the garbage collector comes by."""

from __future__ import annotations

import gc
import threading
from weakref import ref

import pytest
from pipeline_kit import pictures, small_engine

from vicostream_kernels.cache import CacheStream
from vicostream_kernels.pipeline import session

WAIT_S = 20
BOTH = pytest.mark.parametrize("overlap", [False, True])


@pytest.fixture(autouse=True)
def no_garbage_collector():
    """It comes when a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def begun(stream):
    """An answer half way that only the garbage collector can find."""
    answer = stream.ask("What?", max_new_tokens=6)
    next(answer)
    loop = [answer]
    loop.append(loop)
    return ref(answer)


def own_pages(stream):
    cache = stream.history.cache
    return sum(len(block.pages) for block in cache.blocks if block.kind != "text")


@BOTH
def test_an_answer_that_is_left_gives_its_pages_back(overlap):
    with small_engine(engine__overlap=overlap) as made, made.open() as stream:
        stream.ingest(pictures(16))
        stream.flush()
        used = made.cache.used_pages
        for _ in stream.ask("What?"):
            break
        assert made.cache.used_pages == used
        gone = begun(stream)
        assert made.cache.used_pages > used
        gc.collect()
        assert made.cache.used_pages == used and gone() is None
        assert [figures.finish for figures in stream.recorder.questions] == ["closed"] * 2
        assert not stream.history._holds and not stream.history._kept


@BOTH
def test_the_garbage_collector_may_come_in_the_middle_of_a_chunk(overlap, monkeypatch):
    """In the middle of giving back what has left the window, it brings an answer that held it."""
    evict, left = CacheStream.evict, []

    def collecting(self, block):
        if left:
            left.clear()
            gc.collect()
        evict(self, block)

    monkeypatch.setattr(CacheStream, "evict", collecting)
    settings = {"attention__window": 50, "engine__overlap": overlap}
    with small_engine("streaming-llm", **settings) as made, made.open() as stream:
        stream.ingest(pictures(64)[:32])
        answer = begun(stream)
        stream.ingest(pictures(64)[32:48])
        stream.flush()
        left.append(answer)
        stream.ingest(pictures(64)[48:])
        stream.flush()
        assert not left and stream.recorder.frames_processed == 64
        gc.collect()
        assert answer() is None and not stream.history._retired and not stream.history._holds
        assert made.cache.used_pages == own_pages(stream)


def test_the_garbage_collector_does_not_wait_for_the_last_stage():
    """It may come in a thread that has what the last stage waits for."""
    with small_engine(engine__overlap=True) as made, made.open() as stream:
        stream.ingest(pictures(16))
        stream.flush()
        used = made.cache.used_pages
        begun(stream)
        has_it, go_on = threading.Event(), threading.Event()
        held = dict(stream.history._holds)

        def other():
            with made.turn:
                has_it.set()
                assert go_on.wait(WAIT_S)

        thread = threading.Thread(target=other)
        thread.start()
        assert has_it.wait(WAIT_S)
        gc.collect()
        # Nor does it let go of anything meanwhile.
        assert dict(stream.history._holds) == held and made.cache.used_pages > used
        go_on.set()
        thread.join(WAIT_S)
        assert not stream.history._holds and made.cache.used_pages == used


@BOTH
def test_a_stream_that_is_dropped_gives_its_pages_back(overlap):
    with small_engine("vicostream+stc", engine__overlap=overlap) as made:
        stream = made.open()
        stream.ingest(pictures(16))
        stream.flush()
        assert made.cache.used_pages
        del stream
        assert made.cache.used_pages == 0 and made.cache.streams == []


@BOTH
def test_an_answer_outlives_the_stream_that_it_was_asked(overlap):
    with small_engine(engine__overlap=overlap) as made:
        with made.open() as stream:
            stream.ingest(pictures(16))
            expected = "".join(stream.ask("What?", max_new_tokens=6))
        stream = made.open()
        stream.ingest(pictures(16))
        answer = stream.ask("What?", max_new_tokens=6)
        del stream
        assert "".join(answer) == expected and made.cache.streams
        del answer
        assert made.cache.streams == []


def test_a_stream_may_be_dropped_while_its_last_stage_is_at_work(monkeypatch):
    run, begun, gate = session.Prefill.run, threading.Event(), threading.Event()

    def held(self, chunk):
        begun.set()
        assert gate.wait(WAIT_S)
        return run(self, chunk)

    monkeypatch.setattr(session.Prefill, "run", held)
    with small_engine(engine__overlap=True) as made:
        stream = made.open()
        stream.ingest(pictures(24))
        belt, gone = stream._way, ref(stream)
        assert begun.wait(WAIT_S)
        del stream
        assert gone() is not None
        gate.set()
        for thread in belt._threads:
            thread.join(WAIT_S)
        assert gone() is None and made.cache.streams == [] and belt.unheard() is None
