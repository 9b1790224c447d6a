"""The turn at the cache: one thread's, in fair order, and what waits for it without waiting."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from pipeline_kit import forked, pictures, small_engine

from vicostream_kernels.pipeline import session
from vicostream_kernels.pipeline.lanes import Lane
from vicostream_kernels.pipeline.turn import Turn

WAIT_S = 20


class Noted(Lane):
    def __init__(self):
        self.log = []

    def __enter__(self):
        self.log.append("in")

    def __exit__(self, *_):
        self.log.append("out")


class Watched:
    """A lock that calls ``seen`` before a thread may have to wait for it."""

    def __init__(self, lock, seen):
        self._lock, self._seen, self.release = lock, seen, lock.release

    def acquire(self, blocking=True):
        if blocking:
            self._seen()
        return self._lock.acquire(blocking=blocking)


def start(run):
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_turn_is_one_threads_and_may_be_nested():
    lane = Noted()
    turn, order, waits = Turn(lane), [], threading.Event()

    def other():
        with turn:
            order.append("other")

    with turn:
        turn._lock = Watched(turn._lock, waits.set)
        thread = start(other)
        assert waits.wait(WAIT_S)
        with turn:
            order.append("mine")
    thread.join(WAIT_S)
    assert order == ["mine", "other"] and lane.log == ["in", "out", "in", "out"]


def test_who_comes_back_at_once_comes_after_who_waits():
    turn, order, waits = Turn(Lane()), [], threading.Event()

    def other():
        with turn:
            order.append("other")

    with turn:
        turn._lock = Watched(turn._lock, waits.set)
        thread = start(other)
        assert waits.wait(WAIT_S)
    for _ in range(3):
        with turn:
            order.append("again")
    thread.join(WAIT_S)
    assert order == ["other", "again", "again", "again"]


@pytest.mark.parametrize("streams", [1, 3])
def test_a_token_waits_for_one_chunk_at_most(streams, monkeypatch):
    """However many stand before the last stage; no chunk ends before the answer waits for it."""
    run, order, waits = session.Prefill.run, [], threading.Event()

    def noted(self, chunk):
        assert waits.wait(WAIT_S)
        order.append("chunk")
        return run(self, chunk)

    class Said:
        def next_token(self, ids, logits):
            waits.clear()
            order.append("token")
            return 40

    def seen():
        if threading.current_thread() is threading.main_thread():
            waits.set()

    frames = torch.from_numpy(pictures(48)).clone()
    with small_engine(engine__overlap=True) as made:
        opened = [made.open(fps=2) for _ in range(streams)]
        answer = opened[0].ask("What?", max_new_tokens=7, sampler=Said())
        monkeypatch.setattr(session.Prefill, "run", noted)
        made.turn._lock = Watched(made.turn._lock, seen)
        for stream in opened:
            stream.ingest(frames)
        order.clear()
        list(answer)
        # The last token is said without another being looked for; then chunks are free.
        while order[-1] == "chunk":
            order.pop()
        assert "".join(order).count("chunk" * 2) == 0 and order.count("token") == 6
        waits.set()
        for stream in opened:
            stream.close()


def test_later_is_now_where_nobody_has_the_turn():
    lane, order = Noted(), []
    turn = Turn(lane)

    def call():
        turn.later(lambda: order.append("next"))
        with turn:
            order.append("call")

    turn.later(call)
    assert order == ["call", "next"] and lane.log == ["in", "out"]


def test_later_neither_waits_nor_comes_into_the_middle():
    """The garbage collector calls it in any thread."""
    turn, order, has_it, go_on = Turn(Lane()), [], threading.Event(), threading.Event()

    def other():
        with turn:
            with turn:
                turn.later(lambda: order.append(threading.current_thread()))
            has_it.set()
            assert go_on.wait(WAIT_S)
            order.append("middle")

    thread = start(other)
    assert has_it.wait(WAIT_S)
    turn.later(lambda: order.append(threading.current_thread()))
    assert order == []
    go_on.set()
    thread.join(WAIT_S)
    assert order == ["middle", thread, thread]


def test_a_turn_survives_a_lane_that_fails():
    class Broken(Lane):
        def __enter__(self):
            raise RuntimeError("no stream")

    turn = Turn(Broken())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no stream"), turn:
            pass
    turn._lane = Lane()
    done = []
    start(lambda: turn.__enter__() or done.append(1)).join(WAIT_S)
    assert done == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    turn, has_it, go_on = Turn(Lane()), threading.Event(), threading.Event()

    def other():
        with turn:
            has_it.set()
            go_on.wait(WAIT_S)

    thread = start(other)
    assert has_it.wait(WAIT_S)

    def takes_it():
        with turn:
            return True

    child = forked(takes_it, WAIT_S)
    go_on.set()
    thread.join(WAIT_S)
    assert os.waitpid(child, 0)[1] == 0
