"""Frames that come while something else goes on: order, pace, lateness, and how it ends."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

from vicostream_kernels.pipeline import arrivals as module
from vicostream_kernels.pipeline.arrivals import Arrivals
from vicostream_kernels.pipeline.errors import PipelineError
from vicostream_kernels.pipeline.source import Frame, FrameGroups

WAIT_S = 20
PICTURE = np.zeros((2, 2, 3), np.uint8)


class Source:
    """Frames at given times; waits for ``gate`` before the frame ``gated``, fails at the end with
    ``error``."""

    def __init__(self, times, *, gated=None, error=None):
        self.times, self.gated, self.error = times, gated, error
        self.gate = threading.Event()
        self.decoded = 0
        self.in_use = False

    def __iter__(self):
        for index, time_s in enumerate(self.times):
            if index == self.gated:
                assert self.gate.wait(WAIT_S)
            self.decoded += 1
            yield Frame(PICTURE, time_s, index)
        if self.error is not None:
            raise self.error


def until(holds):
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def drained(arrivals):
    return [frame.index for frame in arrivals if frame is not None]


def test_every_frame_comes_in_order_and_no_more_wait_than_there_is_room_for():
    source = Source([i / 10 for i in range(50)])
    with Arrivals(source, room=4) as arrivals:
        until(lambda: len(arrivals) == 4)
        time.sleep(0.02)
        assert len(arrivals) == 4 and source.decoded == 5  # one in the decoder's hands
        assert drained(arrivals) == list(range(50))
        assert arrivals.late == 0 and len(arrivals.lags_s) == 50
        decoding = arrivals.take_decoding()
        assert len(decoding) == 50 and all(seconds >= 0 for _, seconds in decoding)
        assert arrivals.take_decoding() == []


def test_none_where_no_frame_is_there_yet():
    source = Source([0.0, 0.1], gated=1)
    with Arrivals(source) as arrivals:
        until(lambda: len(arrivals) == 1)
        assert next(arrivals).index == 0 and next(arrivals) is None and next(arrivals) is None
        source.gate.set()
        assert drained(arrivals) == [1]


def test_in_real_time_no_frame_comes_before_its_time():
    with Arrivals(Source([0.0, 0.05, 0.3]), realtime=True) as arrivals:
        began = time.monotonic()
        drained(arrivals)
        assert time.monotonic() - began > 0.2
        assert max(arrivals.lags_s) < 0.2  # the last came soon after its time


def test_late_frames_are_left_out_and_counted():
    source = Source([0.0, 0.1, 0.2, 9.0])
    with Arrivals(source, max_lag_s=0.5) as arrivals:
        until(lambda: len(arrivals) == 4)
        zero = arrivals._zero = time.perf_counter() - 0.65
        taken = drained(arrivals)
        assert time.perf_counter() - zero < 5, "this machine stood still"
    assert taken == [2, 3] and arrivals.late == 2
    assert 0.4 < arrivals.lags_s[0] < 0.6 and arrivals.lags_s[1] == 0.0


def test_what_a_camera_had_kept_is_not_its_pace():
    """The first frames come in a burst: what is on time is measured by the frames after it."""
    source = Source([0.0, 2.0, 2.1], gated=2)
    with Arrivals(source) as arrivals:
        until(lambda: len(arrivals) == 2)
        time.sleep(0.1)
        source.gate.set()
        drained(arrivals)
    # Counted from the first frame nothing would be late for two seconds.
    assert 0 <= arrivals.lags_s[1] and arrivals.lags_s[0] >= 2.0


class Pausing(Source):
    """Stands still for a second before its frame 5, and goes on as if nothing had been."""

    def __iter__(self):
        for frame in super().__iter__():
            time.sleep(1.0 if frame.index == 5 else 0.02)
            yield frame


@pytest.mark.parametrize("realtime", [False, True])
def test_a_source_that_paused_is_not_late_for_ever(monkeypatch, realtime):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
    source = Pausing([i / 50 for i in range(50)])
    with Arrivals(source, realtime=realtime, max_lag_s=0.5) as arrivals:
        taken = drained(arrivals)
    assert taken[:5] == [0, 1, 2, 3, 4] and arrivals.late > 0
    assert taken[-9:] == list(range(41, 50))


def test_what_is_late_by_our_fault_stays_late(monkeypatch):
    """The decoder had to wait for room: there is no new pace in what it decodes then."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.35)
    with Arrivals(Source([i / 100 for i in range(90)]), realtime=True, max_lag_s=0.1, room=2) as a:
        until(lambda: len(a) == 2)
        zero = a._zero
        for _ in range(4):
            time.sleep(0.2)
            assert next(a) is None or a.lags_s[-1] <= 0.1
        assert a.late > 0 and a._zero == zero


def test_an_error_comes_after_the_frames_before_it():
    source = Source([0.0, 0.1], error=PipelineError("the network is gone"))
    with Arrivals(source) as arrivals:
        taken = []
        with pytest.raises(PipelineError, match="network is gone"):
            for frame in arrivals:
                taken += [] if frame is None else [frame.index]
        assert taken == [0, 1]
        assert next(arrivals, "end") == "end"


def test_close_ends_a_thread_that_waits():
    full = Arrivals(Source([i / 10 for i in range(9)]), room=2)
    until(lambda: len(full) == 2)
    pacing = Arrivals(Source([0.0, 1e6]), realtime=True)
    until(lambda: len(pacing) == 1)
    for arrivals in (full, pacing):
        arrivals.close()
        assert not arrivals._thread.is_alive() and arrivals.over


def test_a_second_interrupt_leaves_the_file_to_the_thread_that_reads_it():
    """A true signal: ``Thread.join`` would take the thread for ended, and FFmpeg would crash."""
    source = Source([0.0], gated=0)
    arrivals = Arrivals(source)
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        arrivals.close()
    assert source.in_use
    source.gate.set()
    arrivals.close()
    assert not source.in_use and not arrivals._thread.is_alive()


def test_groups_wait_for_frames_and_can_be_called_away():
    source = Source([0.0, 0.1, 0.2], gated=2)
    called = threading.Event()
    with Arrivals(source) as arrivals:
        groups = FrameGroups(arrivals)
        threading.Timer(0.05, called.set).start()
        assert [f.index for f in groups.take(3, 9.0, called.is_set)] == [0, 1]
        assert not groups.ended
        source.gate.set()
        assert [f.index for f in groups.take(3, 9.0)] == [2] and groups.ended
        assert groups.take(3, 9.0) == []
