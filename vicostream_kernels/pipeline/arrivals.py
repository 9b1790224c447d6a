"""Frames as they arrive: decoded in a thread of their own, at the video's pace if that is wanted.

While a chunk is worked on or an answer is decoded, the video goes on; who waits for frames can be
called away by a question.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from vicostream_kernels.pipeline.source import Frame, VideoSource

#: So long a wait lasts before whoever waits looks for questions and signals.
_LOOK_S = 0.01
#: So long every frame comes too late, though there is room for it, until that is the source's pace.
_PATIENCE_S = 2.0
#: Lags that are kept for the figures.
_KEPT = 20_000


@dataclass(frozen=True)
class _Arrived:
    frame: Frame
    began_s: float  # its decoding, by time.perf_counter
    decode_s: float


class Arrivals(Iterator["Frame | None"]):
    """The frames of ``source`` in order; None where none is there yet.

    At most ``room`` frames wait: then the decoder does, and nothing is lost. With ``realtime`` no
    frame comes before its time. A frame that is taken more than ``max_lag_s`` after it was due is
    left out, and counted in ``late``.

    A frame is due so long after the first as its time says; where frames come faster than that (a
    camera may begin with what it has kept), the fastest is the measure. A source that has paused,
    or whose clock is slow, is not late for ever: its own pace is the measure then. What the source
    raises comes after the frames before it.
    """

    def __init__(
        self,
        source: VideoSource,
        *,
        realtime: bool = False,
        max_lag_s: float | None = None,
        room: int = 16,
    ) -> None:
        self._source, self._realtime, self._max_lag_s = source, realtime, max_lag_s
        self._room = room
        self.late = 0
        self.lags_s: deque[float] = deque(maxlen=_KEPT)
        self._waiting: deque[_Arrived] = deque()
        self._decoding: list[tuple[float, float]] = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._ended = False
        self._error: BaseException | None = None
        self._zero: float | None = None  # when the time 0 of the stream was, by time.perf_counter
        self._fastest: float | None = None  # the same by the frames of late, all of them late
        self._late_since = 0.0
        self._thread = threading.Thread(target=self._read, name="vicostream-arrivals", daemon=True)
        source.in_use = True
        self._thread.start()

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; it is inside FFmpeg for 20 s at most, where a network is silent. Who
        interrupts that leaves the source in use."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()
            # Not by join: before Python 3.13 one that is interrupted takes the thread for ended.
            self._changed.wait_for(lambda: self._ended)
        self._source.in_use = False
        self._thread.join()

    @property
    def over(self) -> bool:
        """Whether nobody wants more."""
        return self._over.is_set()

    def __len__(self) -> int:
        """Frames that wait."""
        return len(self._waiting)

    def __next__(self) -> Frame | None:
        with self._changed:
            if not self._waiting and not self._ended:
                self._changed.wait(_LOOK_S)
            while self._waiting:
                arrived = self._waiting.popleft()
                self._changed.notify_all()
                lag = self._lag_s(arrived.frame.time_s)
                if self._max_lag_s is None or lag <= self._max_lag_s:
                    self.lags_s.append(max(lag, 0.0))
                    self._decoding.append((arrived.began_s, arrived.decode_s))
                    return arrived.frame
                self.late += 1
            if not self._ended:
                return None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def take_decoding(self) -> list[tuple[float, float]]:
        """When decoding began and how long it took, for each frame taken since the last call."""
        taken, self._decoding = self._decoding, []
        return taken

    def _lag_s(self, time_s: float) -> float:
        return time.perf_counter() - (self._zero or 0.0) - time_s

    # -- the thread ------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            with closing(iter(self._source)) as frames:
                while not self._over.is_set():
                    began = time.perf_counter()
                    frame = next(frames, None)
                    if frame is None:
                        break
                    self._arrive(_Arrived(frame, began, time.perf_counter() - began))
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _arrive(self, arrived: _Arrived) -> None:
        zero = time.perf_counter() - arrived.frame.time_s
        if self._zero is None:
            self._zero = zero
        elif self._realtime:
            self._over.wait(max(0.0, -self._lag_s(arrived.frame.time_s)))
        else:
            self._zero = min(self._zero, zero)
        self._follow(zero)
        with self._changed:
            while len(self._waiting) >= self._room and not self._over.is_set():
                self._fastest = None  # late by our own fault
                self._changed.wait()
            self._waiting.append(arrived)
            self._changed.notify_all()

    def _follow(self, zero: float) -> None:
        """Goes by the frames of late where all of them would be left out, and not by our fault."""
        now = time.perf_counter()
        if self._max_lag_s is None or zero - self._zero <= self._max_lag_s:
            self._fastest = None
        elif self._fastest is None:
            self._fastest, self._late_since = zero, now
        else:
            self._fastest = min(self._fastest, zero)
            if now - self._late_since > _PATIENCE_S:
                self._zero, self._fastest = self._fastest, None
