"""What comes in while a run goes on: frames, and questions by their times or as they are typed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vicostream_kernels.pipeline.arrivals import Arrivals
from vicostream_kernels.pipeline.report import Recorder, percentiles
from vicostream_kernels.pipeline.source import Frame, FrameGroups, VideoSource
from vicostream_kernels.pipeline.text import Question
from vicostream_kernels.pipeline.typed import TypedQuestions

_LOOK_S = 0.1


@dataclass(frozen=True)
class Live:
    """How far a run goes with the time that passes: ``interactive`` takes typed questions,
    ``realtime`` no frame before its time, ``max_lag_s`` none that is later than that. ``paced``:
    whether frames are due at some time; those of a file that is read as fast as it goes are not."""

    interactive: bool = False
    realtime: bool = False
    max_lag_s: float | None = None
    paced: bool = True

    def __bool__(self) -> bool:
        return self.interactive or self.realtime or self.max_lag_s is not None


class Feed:
    """The frames of ``source`` in groups of at most ``chunk``, each up to the next question.

    ``shift`` is the time of the stream at which the video begins. ``enough`` says that whoever
    waits for frames shall not any longer. ``waiting`` are the questions that were not asked yet;
    when the feed is closed those that were typed are among them.
    """

    def __init__(
        self,
        source: VideoSource,
        questions: Sequence[Question],
        recorder: Recorder,
        enough: Callable[[], bool],
        *,
        chunk: int,
        shift: float = 0.0,
        live: Live = Live(),  # noqa: B008 (frozen)
    ) -> None:
        self.waiting = sorted(questions, key=when)
        self._source, self._recorder, self._shift = source, recorder, shift
        self._chunk, self._live = chunk, live
        self._typed: TypedQuestions | None = None
        self._arrivals: Arrivals | None = None
        self._enough = lambda: enough() or bool(self._typed)

    def __enter__(self) -> Feed:
        # Threads begin here, not before: who makes a feed may be stopped before it is entered.
        live = self._live
        frames: Iterator[Frame | None] = iter(self._source)
        with ExitStack() as begun:
            if live:
                arrivals = Arrivals(
                    self._source,
                    realtime=live.realtime,
                    max_lag_s=live.max_lag_s if live.paced else None,
                    room=2 * self._chunk,
                )
                self._arrivals = frames = begun.enter_context(arrivals)
            if live.interactive:
                self._typed = begun.enter_context(TypedQuestions())
            self._open = begun.pop_all()
        self._groups = FrameGroups(frames)
        return self

    def __exit__(self, *leaving: Any) -> None:
        try:
            self._open.__exit__(*leaving)  # what it raises has that in its context
        finally:
            while self._typed:
                self.waiting.append(Question(None, self._typed.take().text))
            if self._arrivals is not None:
                self._recorder.live = self._figures(self._arrivals)

    @property
    def ended(self) -> bool:
        """Whether all frames were taken."""
        return self._groups.ended

    @property
    def over(self) -> bool:
        """Whether nobody wants frames any more."""
        return self._arrivals is not None and self._arrivals.over

    def take(self) -> list[Frame]:
        """The frames that come next. None where a question is due, where the video has ended, and
        where it was enough."""
        name = "decode" if self._arrivals is None else "wait"
        with self._recorder.trace.span(name, host=True) as span:
            batch = self._groups.take(self._chunk, self._limit, self._enough)
        if self._arrivals is None:
            self._recorder.decoded(span)
        else:
            self._account(self._arrivals)
        return batch

    def take_ready(self) -> list[Frame]:
        """A chunk's frames where they are there already, none otherwise."""
        arrivals = self._arrivals
        if arrivals is None or len(arrivals) < self._chunk:
            return []
        batch = self._groups.take(self._chunk, self._limit, lambda: not len(arrivals))
        self._account(arrivals)
        return batch

    def due(self, now_s: float) -> Question | None:
        """The question whose turn it is when :meth:`take` gives no frames."""
        if self._typed:
            return self._next_typed(self._typed, now_s)
        # Called away for one that is not there: by a signal, which somebody else looks at.
        return self.waiting.pop(0) if self.waiting else None

    @property
    def listens(self) -> bool:
        """Whether questions may still be typed."""
        typed = self._typed
        # In this order: what comes in between is the last line, and the end right after it.
        return typed is not None and (not typed.ended or bool(typed))

    def typed(self, now_s: float) -> Question | None:
        """The next one that is typed; None when there will be no more."""
        while self._typed is not None and self.listens:
            if self._typed:
                return self._next_typed(self._typed, now_s)
            self._typed.wait(_LOOK_S)
        return None

    @staticmethod
    def _next_typed(typed: TypedQuestions, now_s: float) -> Question:
        line = typed.take()
        return Question(now_s, line.text, came_s=line.came_s)

    @property
    def _limit(self) -> float:
        return (when(self.waiting[0]) if self.waiting else math.inf) - self._shift

    def _account(self, arrivals: Arrivals) -> None:
        for began_s, seconds in arrivals.take_decoding():
            self._recorder.decoded_beside(began_s, seconds)

    def _figures(self, arrivals: Arrivals) -> dict[str, object]:
        lags = list(arrivals.lags_s) if self._live.paced else []
        lag = {**percentiles(lags), "max": round(max(lags), 4)} if lags else None
        return {
            "interactive": self._live.interactive,
            "realtime": self._live.realtime,
            "max_lag_s": self._live.max_lag_s,
            "late": arrivals.late,
            "lag_s": lag,
        }


def when(question: Question) -> float:
    """Its time; the end is later than any."""
    return math.inf if question.time_s is None else question.time_s
