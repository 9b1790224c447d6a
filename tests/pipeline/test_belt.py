"""Stages in turn and in threads: order, room, errors, the end."""

from __future__ import annotations

import gc
import os
import threading
import time
from weakref import ref

import pytest
from pipeline_kit import forked

from vicostream_kernels.pipeline import belt as belt_module
from vicostream_kernels.pipeline.belt import Belt, Line
from vicostream_kernels.pipeline.lanes import Lane

WAIT_S = 20


class Full(Exception):
    pass


@pytest.fixture(params=["line", "belt"])
def way(request):
    """Makes a way; closes it at the end."""
    made = []

    def make(*stages):
        lanes = [Lane() for _ in stages]
        made.append(Line(stages, Full) if request.param == "line" else Belt(stages, Full, lanes))
        return made[-1]

    yield make
    for each in made:
        each.close()


def put(way, value):
    way.ready()
    way.put(value)


def test_values_pass_all_stages_in_their_order(way):
    out = []
    belt = way(lambda x: x + 1, lambda x: time.sleep(x % 3 / 1000) or 2 * x, out.append)
    for x in range(30):
        put(belt, x)
    belt.drain()
    assert out == [2 * (x + 1) for x in range(30)]


def test_what_was_interrupted_before_it_told_the_others_is_told_later(monkeypatch):
    out, full = [], [True]

    def stage(x):
        if full[0]:
            raise Full
        out.append(x)

    def interrupt():
        raise KeyboardInterrupt

    belt = Belt([stage], Full, [Lane()])
    try:
        put(belt, 1)
        with pytest.raises(Full):
            belt.drain()
        full[0] = False
        with monkeypatch.context() as patch:
            patch.setattr(belt._changed, "notify_all", interrupt)
            with pytest.raises(KeyboardInterrupt):
                belt.drain()
        done = threading.Thread(target=belt.drain, daemon=True)
        done.start()
        done.join(WAIT_S)
        assert out == [1]
    finally:
        belt.stop()


class NeverEntered(threading.Condition):
    def __enter__(self):
        raise AssertionError("entered in Python")


def test_a_signal_finds_no_lock_half_taken():
    """A condition is entered and left by Python: what a signal raises there leaves it locked."""
    out = []
    belt = Belt([lambda x: x + 1, out.append], Full, [Lane(), Lane()])
    belt._changed.__class__ = NeverEntered
    for x in range(10):
        put(belt, x)
    belt.settle()
    belt.drain()
    assert belt.unheard() is None and out == list(range(1, 11))
    belt.close()


def test_stages_work_at_the_same_time():
    """Each waits for the other: in turn that would never end."""
    meeting = threading.Barrier(2, timeout=WAIT_S)
    out = []

    def meet(x):
        if 0 < x < 5:
            meeting.wait()
        return x

    belt = Belt([meet, lambda x: meet(x + 1), out.append], Full, [Lane()] * 3)
    try:
        for x in range(5):
            put(belt, x)
        belt.drain()
    finally:
        belt.close()
    assert out == [1, 2, 3, 4, 5]


def test_a_full_belt_takes_nothing():
    """A stage that stands still stops the ones before it: memory does not grow."""
    gate = threading.Event()
    entered = []
    belt = Belt([entered.append, lambda _: gate.wait(WAIT_S)], Full, [Lane()] * 2)
    taken = []

    def feed():
        for x in range(10):
            put(belt, x)
            taken.append(x)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        time.sleep(0.3)
        assert len(taken) == 4 and len(entered) <= 3
        gate.set()
        feeder.join(WAIT_S)
        belt.drain()
        assert entered == list(range(10))
    finally:
        gate.set()
        belt.close()


def test_what_waits_is_tried_again_and_nothing_is_lost_or_doubled(way):
    room, out, first = [], [], []

    def last(x):
        if x == 2 and not room:
            raise Full(x)
        out.append(x)

    belt = way(lambda x: first.append(x) or x, last)
    told = 0
    for x in range(6):
        while True:
            try:
                belt.ready()
                break
            except Full:
                told += 1
                if told == 3:
                    room.append(1)
        try:
            belt.put(x)
        except Full:
            told += 1
    while True:
        try:
            belt.drain()
            break
        except Full:
            told += 1
            if told >= 3:
                room.append(1)
    assert told >= 1 and out == first == list(range(6))


def test_what_waits_is_tried_when_the_caller_calls_again_and_not_before(way):
    """The caller makes room between its calls: what failed before that is no news."""
    room, out, tries = [], [], []

    def last(x):
        tries.append(x)
        if not room:
            raise Full(x)
        out.append(x)

    belt = way(last)
    with pytest.raises(Full):
        put(belt, 0)
        belt.drain()
    time.sleep(0.05)
    belt.settle()
    assert tries == [0]
    room.append(1)
    belt.drain()
    assert out == [0] and tries == [0, 0]


def test_a_stage_that_waits_for_its_own_belt_is_told():
    belt = Belt([lambda x: belt.settle()], Full, [Lane()])
    try:
        put(belt, 0)
        with pytest.raises(RuntimeError, match="its own stream"):
            belt.drain()
    finally:
        belt.close()


def test_a_question_comes_past_what_waits(way):
    """``settle`` neither tries again nor says what can be tried again."""
    room, out = [], []

    def last(x):
        if x == 1 and not room:
            raise Full(x)
        out.append(x)

    belt = way(last)
    for x in range(2):
        try:
            put(belt, x)
        except Full:
            pass
    belt.settle()
    belt.settle()
    assert out == [0]
    room.append(1)
    for _ in range(2):  # the belt has not said it yet
        try:
            belt.drain()
        except Full:
            continue
    assert out == [0, 1]


@pytest.mark.parametrize("call", ["ready", "drain", "settle"])
def test_the_end_is_said_once_and_nothing_follows(call):
    out = []

    def last(x):
        if x == 1:
            raise RuntimeError("broken")
        out.append(x)

    belt = Belt([lambda x: x, last], Full, [Lane()] * 2)
    put(belt, 0)
    put(belt, 1)
    belt._threads[1].join(WAIT_S)
    with pytest.raises(RuntimeError, match="broken"):
        getattr(belt, call)()
    belt.drain()
    belt.settle()
    belt.close()
    belt.close()
    assert out == [0] and not any(thread.is_alive() for thread in belt._threads)


def test_a_closed_belt_drops_what_is_on_its_way():
    gate, out = threading.Event(), []

    def slow(x):
        gate.wait(WAIT_S)
        return x

    belt = Belt([slow, out.append], Full, [Lane()] * 2)
    for x in range(2):
        put(belt, x)
    closing = threading.Thread(target=belt.close)
    closing.start()
    gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive() and len(out) <= 1
    assert not any(thread.is_alive() for thread in belt._threads)


def failing(error, *, at=0):
    """A stage that raises at the value ``at``; values pass otherwise."""

    def stage(value):
        if value == at:
            raise error
        return value

    return stage


def ended(belt, at=0):
    """Waits for the stage ``at`` to have failed for good."""
    belt._threads[at].join(WAIT_S)
    assert not belt._threads[at].is_alive()


def test_a_closed_belt_still_says_what_nobody_has_heard():
    belt = Belt([failing(RuntimeError("broken"))], Full, [Lane()])
    put(belt, 0)
    ended(belt)
    belt.close()
    assert not belt.over and str(belt.unheard()) == "broken"
    assert belt.over and belt.unheard() is None
    belt.close()
    assert belt.unheard() is None


def test_what_was_heard_is_not_said_again_nor_what_follows_it():
    """Two stages fail for good: what the second has to say is of a way that had ended."""
    gate = threading.Event()

    def late(value):
        gate.wait(WAIT_S)
        raise ValueError("late")

    belt = Belt([late, failing(RuntimeError("broken"))], Full, [Lane()] * 2)
    belt._inboxes[1].append(0)
    put(belt, 1)
    ended(belt, 1)
    with pytest.raises(RuntimeError, match="broken"):
        belt.drain()
    gate.set()
    belt.close()
    assert belt.unheard() is None


def test_a_stage_that_fails_while_the_belt_is_closed_is_heard():
    begun, gate = threading.Event(), threading.Event()

    def slow(value):
        begun.set()
        gate.wait(WAIT_S)
        raise RuntimeError("broken")

    belt = Belt([slow], Full, [Lane()])
    put(belt, 0)
    assert begun.wait(WAIT_S)
    belt.stop()
    gate.set()
    belt.close()
    assert str(belt.unheard()) == "broken"


def test_an_error_that_waits_behind_one_that_was_heard_is_heard():
    """A stage wants to be tried again; before the caller makes room, another fails for good."""
    begun, gate = threading.Event(), threading.Event()

    def first(value):
        if value == 1:
            begun.set()
            gate.wait(WAIT_S)
            raise RuntimeError("broken")
        return value

    def last(value):
        begun.wait(WAIT_S)
        raise Full(value)

    belt = Belt([first, last], Full, [Lane()] * 2)
    for x in range(2):
        put(belt, x)
    with pytest.raises(Full):
        belt.drain()
    gate.set()
    belt.close()
    assert str(belt.unheard()) == "broken"


def interrupt_the_wait(belt):
    """Ctrl-C while the caller, and no stage, waits; once."""
    wait, caller = belt._changed.wait, threading.current_thread()

    def interrupted(timeout=None):
        if threading.current_thread() is caller:
            del belt._changed.wait
            raise KeyboardInterrupt
        return wait(timeout)

    belt._changed.wait = interrupted


@pytest.mark.parametrize("call", ["ready", "drain", "settle"])
def test_a_wait_that_is_interrupted_changes_nothing(call):
    gate, out = threading.Event(), []
    belt = Belt([lambda x: gate.wait(WAIT_S) and x, out.append], Full, [Lane()] * 2)
    try:
        for x in (1, 2):
            put(belt, x)
        interrupt_the_wait(belt)
        with pytest.raises(KeyboardInterrupt):
            getattr(belt, call)()
        assert not belt.over
        gate.set()
        put(belt, 3)
        belt.drain()
        assert out == [1, 2, 3]
    finally:
        gate.set()
        belt.close()


def test_a_stage_cannot_close_its_own_belt():
    """That would wait for itself; values that come after it must not go nowhere."""
    belt = Belt([lambda x: belt.close()], Full, [Lane()])
    put(belt, 0)
    with pytest.raises(RuntimeError, match="its own stream"):
        belt.drain()
    assert belt.over
    belt.close()


def test_threads_that_could_be_started_end_when_one_could_not(monkeypatch):
    before, start = set(threading.enumerate()), threading.Thread.start

    def limited(thread):
        if thread.name == "vicostream-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="start new thread"):
        Belt([print] * 3, Full, [Lane()] * 3)
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
    assert set(threading.enumerate()) == before


def test_an_error_that_was_heard_goes_when_its_hearer_lets_it_go():
    """What a stage worked on is large: it must not wait for the garbage collector."""

    class Large:
        pass

    gone = []

    def last(value):
        gone.append(ref(value))
        raise RuntimeError("broken")

    gc.disable()
    try:
        belt = Belt([last], Full, [Lane()])
        put(belt, Large())
        ended(belt)
        for hear in (belt.drain, belt.close):
            try:
                hear()
            except RuntimeError:
                pass
        assert gone[0]() is None
    finally:
        gc.enable()


def test_the_end_of_the_interpreter_says_what_nobody_has_heard():
    belts = [Belt([failing(RuntimeError(f"broken {n}"))], Full, [Lane()]) for n in range(2)]
    for belt in belts:
        put(belt, 0)
        ended(belt)
    with pytest.raises(RuntimeError, match="broken") as raised:
        belt_module._close_all()
    said = {str(raised.value), str(raised.value.__context__)}
    assert said == {"broken 0", "broken 1"}
    belt_module._close_all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_not_held_up_by_stages_that_it_has_not():
    begun, gate = threading.Event(), threading.Event()
    belt = Belt([lambda x: begun.set() or gate.wait(WAIT_S)], Full, [Lane()])
    put(belt, 0)
    assert begun.wait(WAIT_S)
    held, let_go = threading.Event(), threading.Event()

    def hold():
        with belt._changed:
            held.set()
            let_go.wait(WAIT_S)

    threading.Thread(target=hold).start()
    assert held.wait(WAIT_S)

    def closes():
        over = belt.over
        belt.settle()
        belt.close()
        return over and belt.unheard() is None

    child = forked(closes, WAIT_S)
    let_go.set()
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    belt.drain()
    belt.close()
