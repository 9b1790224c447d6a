"""Stages in turn and in threads: order, room, errors, the end."""

from __future__ import annotations

import threading
import time

import pytest

from vicostream_kernels.pipeline.belt import Belt, Line
from vicostream_kernels.pipeline.lanes import Lane, Turn

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


def test_a_turn_is_one_threads_and_may_be_nested():
    class Noted(Lane):
        def __init__(self):
            self.log = []

        def __enter__(self):
            self.log.append("in")

        def __exit__(self, *_):
            self.log.append("out")

    lane = Noted()
    turn, order = Turn(lane), []

    def other():
        with turn:
            order.append("other")

    with turn, turn:
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("mine")
    thread.join(WAIT_S)
    assert order == ["mine", "other"] and lane.log == ["in", "out", "in", "out"]
