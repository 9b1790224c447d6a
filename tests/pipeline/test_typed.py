"""Questions that come line by line."""

from __future__ import annotations

import os
import sys
import time

import pytest

from vicostream_kernels.pipeline import typed as module
from vicostream_kernels.pipeline.typed import TypedQuestions


@pytest.fixture
def pipe():
    read, write = os.pipe()
    ends = [read, write]
    yield ends
    for end in ends:
        os.close(end)


def all_of(questions):
    taken = []
    while questions or not questions.ended:
        questions.wait(1.0)
        while questions:
            taken.append(questions.take().text)
    return taken


def test_lines_come_one_by_one_and_the_last_needs_no_end(pipe):
    with TypedQuestions(pipe[0]) as questions:
        assert not questions and not questions.ended
        before = time.perf_counter()
        os.write(pipe[1], b"  What is it?\r\n\n   \nWo ist G\xc3\xb6")
        questions.wait(20)
        assert questions
        line = questions.take()
        assert line.text == "What is it?" and before <= line.came_s <= time.perf_counter()
        assert not questions  # the rest has no end yet
        os.write(pipe[1], b"tz?\nlatin \xe9\nlast")
        os.close(pipe.pop())
        assert all_of(questions) == ["Wo ist Götz?", "latin \ufffd", "last"]
        assert questions.ended
        with pytest.raises(IndexError):
            questions.take()


def test_no_input_is_the_end_of_it():
    read, write = os.pipe()
    os.close(write), os.close(read)
    with TypedQuestions(read) as questions:
        assert all_of(questions) == []


def test_who_writes_too_much_has_to_wait(pipe, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    with TypedQuestions(pipe[0]) as questions:
        os.write(pipe[1], b"".join(b"%d\n" % i for i in range(9)))
        time.sleep(0.05)
        assert len(questions._lines) == 3
        os.close(pipe.pop())
        assert all_of(questions) == [str(i) for i in range(9)]


def test_a_line_without_end_is_cut(pipe, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 8)
    with TypedQuestions(pipe[0]) as questions:
        os.write(pipe[1], b"x" * 20)
        os.close(pipe.pop())
        assert "".join(all_of(questions)) == "x" * 20


def test_close_does_not_wait_for_more(pipe):
    questions = TypedQuestions(pipe[0])
    os.write(pipe[1], b"left?\n")
    questions.wait(20)
    questions.close()
    assert not questions._thread.is_alive() and questions.take().text == "left?"


def test_a_flood_leaves_no_more_than_may_wait(pipe, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    questions = TypedQuestions(pipe[0])
    os.write(pipe[1], b"".join(b"%d\n" % i for i in range(9)))
    questions.wait(20)
    time.sleep(0.05)
    questions.close()
    assert all_of(questions) == ["0", "1", "2"]


def test_close_leaves_a_thread_that_is_held_up(pipe, monkeypatch):
    """Somebody else has read what was there: the terminal of two programs."""
    monkeypatch.setattr(module, "_LEAVE_S", 0.05)
    monkeypatch.setattr(module.select, "select", lambda *_: ([pipe[0]], [], []))
    questions = TypedQuestions(pipe[0])
    time.sleep(0.05)
    before = time.monotonic()
    questions.close()
    assert time.monotonic() - before < 10
    os.write(pipe[1], b"at last\n")


def test_what_was_opened_in_place_of_standard_input_is_not_read(pipe, monkeypatch):
    """Where a shell says ``<&-`` the next file that is opened, the video say, has number 0."""
    os.write(pipe[1], b"bytes of a video\n")
    kept = os.dup(0)
    try:
        os.dup2(pipe[0], 0)
        monkeypatch.setattr(sys, "stdin", None)
        with TypedQuestions() as questions:
            questions.wait(20)
            assert questions.ended and not questions
    finally:
        os.dup2(kept, 0)
        os.close(kept)
